"""The features of all images as the ways of grouping see them: unit rows, neighbours, and what follows of both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..errors import DataError
from ..neighbors import topk_neighbors

T = TypeVar("T")

Rows = NDArray[np.float32]
Indices = NDArray[np.int64]

NEIGHBORS = 50
"""Neighbours that are searched of each image."""
FITTED_IMAGES = 20_000
"""Images to which k-means and heads are fitted; more change little and take longer."""
COMPONENTS = 128
"""Principal components on which distances are computed. They keep nearly all distances between unit features."""


class FeatureSpace:
    """Features of N images.

    Args:
        features: (N, D) float32 on any device, not normalised.
        seed: seed of everything random.

    Attributes:
        unit: (N, D) float32, rows of length one.
        index: (N, k) int64, neighbours by falling cosine similarity without the image itself.
        similarity: (N, k) float32.

    Raises:
        DataError: if there are fewer than three images, if a feature is not finite, or if all images have the same.
    """

    def __init__(self, features: Tensor, seed: int = 0) -> None:
        n = len(features)
        if n < 3:
            raise DataError(f"{n} images are too few to group: at least 3 are needed")
        if not bool(torch.isfinite(features).all()):
            row = int((~torch.isfinite(features).all(dim=1)).nonzero()[0])
            raise DataError(f"the features of image {row} are not finite; the network does not fit these images")
        rows = F.normalize(features.float(), dim=1)
        if bool((rows == rows[0]).all()):
            raise DataError(f"all {n} images have the same features: they are equal, so there is nothing to group")
        similarity, index = topk_neighbors(rows, min(NEIGHBORS, n - 1))
        self.seed = seed
        self.unit: Rows = rows.cpu().numpy()
        self.index: Indices = index.cpu().numpy()
        self.similarity: Rows = similarity.cpu().numpy()
        self._kept: dict[Hashable, Any] = {}
        self._locks: dict[Hashable, Lock] = defaultdict(Lock)

    def __len__(self) -> int:
        return len(self.unit)

    def kept(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return what ``compute`` gave the first time for this key. Threads wait for one another."""
        with self._locks[key]:
            if key not in self._kept:
                self._kept[key] = compute()
            value: T = self._kept[key]
            return value

    @property
    def reduced(self) -> Rows:
        """(N, d) float32: principal components of the unit rows."""
        return self.kept("reduced", lambda: principal_components(self.unit))

    @property
    def directions(self) -> Rows:
        """(N, d) float32: the principal components as unit rows, for the silhouette."""
        return self.kept("directions", lambda: unit_rows(self.reduced))

    def neighbors(self, k: int) -> Indices:
        """Return the (N, k') nearest neighbours, k' at most ``k`` and a twentieth of the images."""
        return self.index[:, : max(1, min(k, len(self) // 20, self.index.shape[1]))]

    def smoothed(self, k: int, rounds: int) -> Rows:
        """Return unit features averaged over the neighbour graph, (N, D) float32; those themselves for 0 rounds.

        In each round, an image's features become the mean of themselves and of the mean over its k nearest neighbours.
        This draws the images of a group together, however many they are, and leaves the gaps between groups.
        """
        if rounds == 0:
            return self.unit
        index = self.neighbors(k)

        def compute() -> Rows:
            rows = torch.from_numpy(self.smoothed(k, rounds - 1))
            neighbors = torch.from_numpy(index)
            means = torch.empty_like(rows)
            for part in torch.arange(len(rows)).split(4096):
                means[part] = rows[neighbors[part]].mean(dim=1)
            smoothed: Rows = F.normalize(rows + means, dim=1).numpy()
            return smoothed

        return self.kept(("smoothed", index.shape[1], rounds), compute)

    def smoothed_reduced(self, k: int, rounds: int) -> Rows:
        """Return the principal components of :meth:`smoothed`, (N, d) float32."""
        if rounds == 0:
            return self.reduced
        key = ("smoothed and reduced", self.neighbors(k).shape[1], rounds)
        return self.kept(key, lambda: principal_components(self.smoothed(k, rounds)))


def drawn_rows(n: int, seed: int) -> Indices:
    """Return the rows, in order, to which a model of n images is fitted: all, or FITTED_IMAGES drawn at random."""
    if n <= FITTED_IMAGES:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:FITTED_IMAGES])


def unit_rows(rows: Rows) -> Rows:
    """Return rows of length one, (N, D) float32; rows of length zero stay."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Rows = rows / np.maximum(length, 1e-12)
    return result


def principal_basis(rows: Rows, most: int = COMPONENTS) -> tuple[Rows, Rows]:
    """Return the mean row, (D,), and the ``most`` leading principal axes, (D, d), both float32; all axes if D is less.

    Args:
        rows: (N, D) float32.
        most: largest number of axes.
    """
    mean: Rows = np.asarray(rows.mean(axis=0, dtype=np.float64), dtype=np.float32)
    if rows.shape[1] <= most:
        return mean, np.eye(rows.shape[1], dtype=np.float32)
    centred = rows - mean
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    basis: Rows = np.ascontiguousarray(vectors[:, ::-1][:, :most].astype(np.float32))
    return mean, basis


def principal_components(rows: Rows, most: int = COMPONENTS) -> Rows:
    """Return the centred rows in the basis of their leading principal axes, (N, d) float32."""
    mean, basis = principal_basis(rows, most)
    components: Rows = ((rows - mean) @ basis).astype(np.float32, copy=False)
    return components
