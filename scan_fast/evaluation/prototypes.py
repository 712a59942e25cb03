"""The images that show what a cluster is about, and those it is least sure of."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import as_ids, as_matrix


@dataclass(frozen=True)
class ClusterPrototypes:
    """The members that represent one cluster, as rows of the input.

    Attributes:
        cluster: the cluster's id.
        size: the number of its members.
        medoid: the most central of ``typical``, or None for an empty cluster.
        typical: the most confident members, most confident first.
        uncertain: the least confident of the other members, least confident first.
    """

    cluster: int
    size: int
    medoid: int | None
    typical: list[int]
    uncertain: list[int]


def prototypes(
    features: ArrayLike, probabilities: ArrayLike, clusters: ArrayLike, per_cluster: int = 10
) -> list[ClusterPrototypes]:
    """Choose the prototypes of every cluster among its own members.

    Args:
        features: (N, D), in which the medoid is central (smallest sum of Euclidean distances).
        probabilities: (N, C); an image's confidence is the probability of its own cluster.
        clusters: (N,) cluster ids from 0 to C - 1.
        per_cluster: at most so many typical and so many uncertain images.

    Returns:
        One entry for each of the C clusters. A small cluster has fewer images, an empty one none; typical and uncertain
        images are never the same. Equal confidences are ordered by row.

    Raises:
        ValueError: for wrong shapes, ids or ``per_cluster``.
    """
    if per_cluster < 1:
        raise ValueError(f"per_cluster must be at least 1, got {per_cluster}")
    points = as_matrix(features, "features")
    matrix = as_matrix(probabilities, "probabilities", rows=points.shape[0])
    ids = as_ids(clusters, "clusters", matrix.shape[1])
    if ids.size != points.shape[0]:
        raise ValueError(f"clusters must have one id for each of {points.shape[0]} features, got {ids.size}")
    confidence = matrix[np.arange(ids.size), ids]
    result = []
    for cluster in range(matrix.shape[1]):
        members = np.flatnonzero(ids == cluster)
        ordered = members[np.argsort(-confidence[members], kind="stable")]
        typical, rest = ordered[:per_cluster], ordered[per_cluster:]
        uncertain = rest[np.argsort(confidence[rest], kind="stable")][:per_cluster]
        result.append(
            ClusterPrototypes(cluster, members.size, _medoid(points, typical), typical.tolist(), uncertain.tolist())
        )
    return result


def _medoid(points: NDArray[np.float64], rows: NDArray[np.int64]) -> int | None:
    if rows.size == 0:
        return None
    distances = np.linalg.norm(points[rows][:, None] - points[rows][None], axis=2)
    return int(rows[distances.sum(axis=1).argmin()])
