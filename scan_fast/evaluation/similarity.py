"""Facts from the neighbours of images: pairs that are nearly alike, outliers, groups that may be one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .arrays import as_array, as_ids


@dataclass(frozen=True)
class LinkedGroups:
    """Two groups with many neighbour links between them.

    Attributes:
        first, second: the groups, ``first < second``.
        lift: links between them, divided by what chance would give.
        affinity: density of links between them, divided by the mean density inside (geometric mean of both); 1 means
            that nothing separates them.
    """

    first: int
    second: int
    lift: float
    affinity: float


def similar_pairs(
    index: ArrayLike, similarity: ArrayLike, least: float
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Return the pairs of rows that are neighbours with at least a certain similarity, each once.

    Args:
        index: (N, k) rows of the neighbours, -1 for none.
        similarity: (N, k) their similarities.
        least: the least similarity.

    Returns:
        (P, 2) int64 with the smaller row first, in ascending order, and (P,) float32.
    """
    neighbors, values = _neighbors(index, similarity)
    rows, columns = np.nonzero((neighbors >= 0) & (values >= least))
    ends = np.sort(np.stack([rows, neighbors[rows, columns]], axis=1), axis=1)
    pairs, first = np.unique(ends, axis=0, return_index=True)
    return pairs.astype(np.int64), values[rows, columns][first]


def outlier_scores(index: ArrayLike, similarity: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how far each row is from its neighbours.

    Args:
        index: (N, k) rows of the neighbours, -1 for none.
        similarity: (N, k) their similarities.

    Returns:
        (N,) mean similarity to the neighbours, NaN without any, and (N,) robust z-scores: by how many deviations
        (1.4826 times the median absolute deviation) it lies below the median. Above 3.5 is usually called an outlier.
    """
    neighbors, values = _neighbors(index, similarity)
    known = neighbors >= 0
    count = known.sum(axis=1)
    total = np.where(known, values, 0).sum(axis=1, dtype=np.float64)
    mean = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    score = np.zeros(len(mean))
    usable = np.isfinite(mean)
    if usable.any():
        below = np.median(mean[usable]) - mean[usable]
        deviation = 1.4826 * np.median(np.abs(below))
        if deviation == 0:  # more than half are alike
            deviation = 1.2533 * np.abs(below).mean()
        score[usable] = below / deviation if deviation > 0 else 0.0
    return mean, score


def linked_groups(index: ArrayLike, clusters: ArrayLike, *, affinity: float) -> list[LinkedGroups]:
    """Find groups that the images' neighbours hardly tell apart, the most linked first.

    Args:
        index: (N, k) rows of the neighbours, -1 for none.
        clusters: (N,) group of each row.
        affinity: the least density of links, relative to that inside.
    """
    ids = as_ids(clusters, "clusters", None)
    neighbors = np.asarray(as_array(index))
    if neighbors.ndim != 2 or len(neighbors) != len(ids):
        raise ValueError(f"index must be ({len(ids)}, k), got {neighbors.shape}")
    n_groups = int(ids.max(initial=-1)) + 1
    rows, columns = np.nonzero(neighbors >= 0)
    ends = ids[rows] * n_groups + ids[neighbors[rows, columns]]
    links = np.bincount(ends, minlength=n_groups**2).reshape(n_groups, n_groups).astype(np.float64)
    size = np.bincount(ids, minlength=n_groups).astype(np.float64)
    between = links + links.T
    chance = np.outer(links.sum(axis=1), size) / max(1, len(ids) - 1)
    chance += chance.T
    inside = np.diagonal(links) / np.maximum(size * (size - 1), 1)
    density = between / np.maximum(2 * np.outer(size, size), 1)
    limit = np.sqrt(np.outer(inside, inside))
    found = []
    for first, second in zip(*np.nonzero(np.triu(between, 1)), strict=True):
        if limit[first, second] == 0:
            continue
        pair = LinkedGroups(
            int(first),
            int(second),
            float(between[first, second] / chance[first, second]),
            float(density[first, second] / limit[first, second]),
        )
        if pair.affinity >= affinity:
            found.append(pair)
    return sorted(found, key=lambda pair: (-pair.affinity, pair.first, pair.second))


def _neighbors(index: ArrayLike, similarity: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    neighbors, values = np.asarray(as_array(index)), np.asarray(as_array(similarity))
    if neighbors.ndim != 2 or neighbors.shape != values.shape:
        raise ValueError(f"index and similarity must be (N, k), got {neighbors.shape} and {values.shape}")
    return neighbors, values
