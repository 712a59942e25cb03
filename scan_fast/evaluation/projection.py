"""Projection of embeddings to the plane, for a map of the images."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from threadpoolctl import threadpool_limits

from ..neighbors import topk_neighbors
from .arrays import as_array

LANDMARKS = 3000
"""t-SNE of so many images takes about ten seconds on one core; all others are placed between them."""

_COMPONENTS = 50
_ITERATIONS = 500
_PERPLEXITY = 30.0
_NEAREST = 3


def project(embeddings: ArrayLike, *, landmarks: int = LANDMARKS, seed: int = 0) -> NDArray[np.float32]:
    """Place images in the plane so that similar ones lie together: PCA, then t-SNE, started from the PCA.

    Of more than ``landmarks`` images, as many are drawn at random and placed by t-SNE. Every other image is placed at
    the mean of its three most similar landmarks, weighted by similarity.

    Args:
        embeddings: (N, D), usually unit rows. Rows that are not finite are placed in the middle.
        landmarks: the number of images for t-SNE, at least 4.
        seed: seed of the draw, the PCA and t-SNE.

    Returns:
        (N, 2) float32, each axis scaled to [0, 1].

    Raises:
        ValueError: for another shape.
    """
    rows = np.asarray(as_array(embeddings), dtype=np.float32)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise ValueError(f"embeddings must be (N, D) with D of at least 1, got {rows.shape}")
    placed = np.full((len(rows), 2), 0.5, dtype=np.float32)
    finite = np.flatnonzero(np.isfinite(rows).all(axis=1))
    if finite.size < 4:  # nothing to arrange
        placed[finite] = np.stack([np.linspace(0, 1, finite.size), np.full(finite.size, 0.5)], axis=1)
        return placed
    chosen = finite
    if finite.size > landmarks:
        chosen = np.sort(np.random.default_rng(seed).permutation(finite)[:landmarks])
    points = _scaled(_tsne(rows[chosen], seed))
    placed[chosen] = points
    others = np.setdiff1d(finite, chosen, assume_unique=True)
    if others.size:
        placed[others] = _between(rows[others], rows[chosen], points)
    return placed


def _tsne(rows: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    n, dimension = rows.shape
    # Two threads of scikit-learn's t-SNE wait for each other in every iteration: one is faster on a busy machine.
    with threadpool_limits(1):
        if np.ptp(rows, axis=0).max() == 0:  # all images are alike
            return np.zeros((n, 2), dtype=np.float32)
        components = min(_COMPONENTS, n, dimension)
        reduced = PCA(components, svd_solver="randomized", random_state=seed).fit_transform(rows)
        if components == 1:
            reduced = np.concatenate([reduced, np.zeros_like(reduced)], axis=1)
        perplexity = min(_PERPLEXITY, (n - 1) / 3)
        tsne = TSNE(2, perplexity=perplexity, max_iter=_ITERATIONS, init="pca", random_state=seed, n_jobs=1)
        placed: NDArray[np.float32] = tsne.fit_transform(reduced)
    return placed


def _scaled(points: NDArray[np.float32]) -> NDArray[np.float32]:
    low, high = points.min(axis=0), points.max(axis=0)
    span = np.where(high > low, high - low, 1)
    scaled: NDArray[np.float32] = np.where(high > low, (points - low) / span, 0.5).astype(np.float32)
    return scaled


def _between(
    rows: NDArray[np.float32], landmarks: NDArray[np.float32], points: NDArray[np.float32]
) -> NDArray[np.float32]:
    similarity, index = topk_neighbors(
        torch.from_numpy(landmarks), min(_NEAREST, len(landmarks)), queries=torch.from_numpy(rows)
    )
    # Relative to the farthest of them, so that the nearest decides if all are about equally similar.
    weight = (similarity - similarity[:, -1:]).double() + 1e-3
    weight = (weight / weight.sum(dim=1, keepdim=True)).unsqueeze(-1)
    found: NDArray[np.float32] = (weight * torch.from_numpy(points)[index]).sum(dim=1).float().numpy()
    return found
