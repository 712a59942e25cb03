"""The class that each cluster is matched to, and how well it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import as_ids
from .metrics import match_clusters

ONE_TO_ONE = "one class for each cluster, by the Hungarian method"
MANY_TO_ONE = "the most frequent class of each cluster, for there are more clusters than classes"


@dataclass(frozen=True)
class Match:
    """Classes of K clusters.

    Attributes:
        classes: (K,) int64 the class of each cluster, -1 for none.
        images: (K,) int64 the number of its images.
        share: (K,) float64 the share of its labelled images that are of that class; NaN without a class or without
            labelled images.
        many_to_one: whether several clusters may have one class.
    """

    classes: NDArray[np.int64]
    images: NDArray[np.int64]
    share: NDArray[np.float64]
    many_to_one: bool

    @classmethod
    def of(cls, clusters: ArrayLike, labels: ArrayLike, n_clusters: int, n_classes: int) -> Match:
        """Match clusters to classes: one to one (Hungarian method), or by majority if there are more clusters.

        Args:
            clusters: (N,) cluster ids.
            labels: (N,) class ids; images of -1 have no label and decide nothing.
            n_clusters: K.
            n_classes: the number of classes.

        Raises:
            ValueError: for wrong shapes or ids, or if no image has a label.
        """
        many_to_one = n_clusters > n_classes
        classes = match_clusters(clusters, labels, n_clusters, n_classes, many_to_one=many_to_one)
        ids, own = as_ids(clusters, "clusters", n_clusters), as_ids(labels, "labels", n_classes, lowest=-1)
        labelled = np.bincount(ids[own >= 0], minlength=n_clusters)
        right = np.bincount(ids[(own >= 0) & (own == classes[ids])], minlength=n_clusters)
        share = np.where((labelled > 0) & (classes >= 0), right / np.maximum(labelled, 1), np.nan)
        return cls(classes, np.bincount(ids, minlength=n_clusters), share, many_to_one)

    @property
    def method(self) -> str:
        """The way in which clusters were matched, in words."""
        return MANY_TO_ONE if self.many_to_one else ONE_TO_ONE

    def names(self, class_names: Sequence[str]) -> list[str]:
        """Return the name of each cluster's class, empty for none."""
        return [class_names[number] if number >= 0 else "" for number in self.classes.tolist()]

    def to_dict(self, class_names: Sequence[str]) -> dict[str, Any]:
        """Return plain values for JSON: the method, and for each cluster its class, images and accuracy inside."""
        columns = zip(self.names(class_names), self.images.tolist(), self.share.tolist(), strict=True)
        return {
            "method": "many-to-one" if self.many_to_one else "one-to-one",
            "clusters": [
                {"cluster": number, "class": name or None, "images": images, "acc": None if acc != acc else acc}
                for number, (name, images, acc) in enumerate(columns)
            ],
        }
