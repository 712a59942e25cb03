"""Choice of the images that show a cluster, and of those that fit it least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

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


POOL = 10
"""Number of a cluster's most confident members among which its central image is chosen, as in the SCAN paper."""


def central_prototypes(
    features: ArrayLike | Tensor, probabilities: ArrayLike | Tensor, pool: int = POOL
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Choose one image for each cluster: of its most confident members the one that is nearest to their mean feature.

    This is how the SCAN paper (arXiv 2005.12320) chooses its prototypes, but a cluster with fewer than ``pool`` members
    is shown by one of these. Equal confidences and equal distances are ordered by row.

    Args:
        features: (N, D) floats, features of the images.
        probabilities: (N, K) floats, the probability of each cluster; an image is in the most probable one, and of
            equal ones in the first.
        pool: the largest number of members whose mean is taken.

    Returns:
        (K,) int64 rows of the chosen images, -1 for a cluster without members, and (K,) float64 Euclidean distances to
        the mean, NaN likewise.

    Raises:
        ValueError: for wrong shapes, values that are not finite, or a pool below 1.
    """
    if pool < 1:
        raise ValueError(f"pool must be at least 1, got {pool}")
    found, given = as_array(probabilities), as_array(features)
    if found.ndim != 2 or found.dtype.kind != "f" or found.shape[1] == 0:
        raise ValueError(f"probabilities must be floats of shape (N, K), got {found.dtype} {found.shape}")
    if given.ndim != 2 or given.dtype.kind != "f" or len(given) != len(found):
        raise ValueError(f"features must be floats of shape ({len(found)}, D), got {given.dtype} {given.shape}")
    for name, values in (("probabilities", found), ("features", given)):
        if not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got NaN or infinite values")
    n_clusters = found.shape[1]
    clusters, confidence = found.argmax(axis=1), found.max(axis=1, initial=0)
    order = np.lexsort((np.arange(len(found)), -confidence, clusters))
    bounds = np.searchsorted(clusters[order], np.arange(n_clusters + 1))
    rows = np.full(n_clusters, -1, dtype=np.int64)
    distances = np.full(n_clusters, np.nan)
    for cluster in range(n_clusters):
        members = np.sort(order[bounds[cluster] : bounds[cluster + 1]][:pool])
        if members.size:
            own = given[members].astype(np.float64)
            distance = np.linalg.norm(own - own.mean(axis=0), axis=1)
            best = int(distance.argmin())
            rows[cluster], distances[cluster] = members[best], distance[best]
    return rows, distances
