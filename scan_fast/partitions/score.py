"""A score of partitions that needs no labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..evaluation.model_selection import modularity
from .space import FeatureSpace, Indices, Rows

SCORED_NEIGHBORS = (5, 20)
"""Numbers of nearest neighbours of each image that should be in its group. Few see the gaps between groups, many see
whether a group holds together."""


@dataclass(frozen=True)
class Score:
    """The label-free score of a partition; higher is better.

    Attributes:
        consistency: share of neighbour pairs within one group, less the share expected if the groups had nothing to do
            with the neighbours: the modularity (Newman and Girvan 2004) of the graphs of the 5 and of the 20 nearest
            neighbours, on average. One large group does not gain by it: its share would be high anyway.
        separation: mean silhouette (Rousseeuw 1987) by cosine distance of the centred features, from -1 to 1.
    """

    consistency: float
    separation: float

    @property
    def total(self) -> float:
        """The sum of both, by which partitions are compared."""
        return self.consistency + self.separation


def label_free_score(labels: Indices, space: FeatureSpace) -> Score:
    """Return the score of a partition.

    Args:
        labels: (N,) group numbers from 0.
        space: features and neighbours of the N images.
    """
    groups = torch.from_numpy(labels)[None]
    numbers = [torch.from_numpy(space.neighbors(k)) for k in SCORED_NEIGHBORS]
    consistency = [float(modularity(groups, index, int(labels.max()) + 1)) for index in numbers]
    return Score(float(np.mean(consistency)), silhouette(labels, space.directions))


def silhouette(labels: Indices, rows: Rows) -> float:
    """Return the mean silhouette by cosine distance, exactly and without an N x N matrix.

    The mean cosine distance of a row to a group is one minus its product with the group's mean row.

    Args:
        labels: (N,) group numbers from 0.
        rows: (N, D) unit rows.
    """
    return float(silhouettes(labels, rows).mean())


def silhouettes(labels: Indices, rows: Rows) -> NDArray[np.float64]:
    """Return the silhouette of each row, (N,) float64; 0 for a row that is alone in its group."""
    groups = int(labels.max()) + 1
    if groups < 2:
        return np.zeros(len(labels))
    sums = group_sums(labels, rows, groups)
    sizes = np.bincount(labels, minlength=groups).astype(np.float64)
    wide = rows.astype(np.float64)
    products = wide @ sums.T  # (N, K): sums of cosine similarities
    own = np.take_along_axis(products, labels[:, None], axis=1)[:, 0]
    own_size = sizes[labels]
    # The row itself, at distance 0, is not one of the others.
    length = (wide**2).sum(axis=1)
    within = 1 - (own - length) / np.maximum(own_size - 1, 1)
    others = 1 - products / np.maximum(sizes, 1)
    others[:, sizes == 0] = np.inf
    np.put_along_axis(others, labels[:, None], np.inf, axis=1)
    nearest = others.min(axis=1)
    largest = np.maximum(within, nearest)
    values = np.where(largest > 0, (nearest - within) / np.where(largest > 0, largest, 1), 0.0)
    result: NDArray[np.float64] = np.where((own_size > 1) & np.isfinite(nearest), values, 0.0)
    return result


def group_sums(labels: Indices, rows: Rows, groups: int) -> NDArray[np.float64]:
    """Return the sum of the rows of each group, (groups, D) float64, in one fixed order of summation."""
    order = np.argsort(labels, kind="stable")
    sums = np.zeros((groups, rows.shape[1]))
    present, starts = np.unique(labels[order], return_index=True)
    sums[present] = np.add.reduceat(rows[order].astype(np.float64), starts, axis=0)
    return sums
