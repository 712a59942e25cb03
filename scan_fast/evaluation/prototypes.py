"""Choice of the images that show a cluster, and of those that fit it least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from .arrays import as_array, as_ids


@dataclass(frozen=True)
class Prototypes:
    """Members of one cluster, as rows of the input.

    Attributes:
        typical: the most confident members, most confident first.
        uncertain: the least confident of the others, least confident first.
    """

    typical: list[int]
    uncertain: list[int]


def prototypes(
    clusters: ArrayLike, confidence: ArrayLike, margin: ArrayLike, cluster: int, *, typical: int, uncertain: int
) -> Prototypes:
    """Choose typical and uncertain members of a cluster; no image is both.

    Equal confidences are ordered by the margin, then by row. NaN counts as the lowest confidence or margin.

    Args:
        clusters: (N,) cluster ids.
        confidence: (N,) the probability of each image's own cluster.
        margin: (N,) ``confidence`` minus the second highest probability.
        cluster: the cluster to show.
        typical: the largest number of typical images.
        uncertain: the largest number of uncertain images.

    Raises:
        ValueError: for wrong shapes.
    """
    ids = as_ids(clusters, "clusters", None)
    scores = {"confidence": as_array(confidence), "margin": as_array(margin)}
    for name, values in scores.items():
        if values.shape != ids.shape:
            raise ValueError(f"{name} must have one value for each of {ids.size} images, got shape {values.shape}")
    members = np.flatnonzero(ids == cluster)
    sure, clear = (np.nan_to_num(values[members].astype(np.float64), nan=-1.0) for values in scores.values())
    ordered = members[np.lexsort((members, -clear, -sure))]
    first, rest = ordered[:typical], ordered[typical:]
    return Prototypes(first.tolist(), rest[::-1][:uncertain].tolist())
