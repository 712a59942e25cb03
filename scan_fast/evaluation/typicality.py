"""Similarity of images to those that a model was trained on, by the mean feature of each cluster."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHARE = 0.01
"""Share of the training images that count as unlike their cluster."""


@dataclass(frozen=True)
class Typicality:
    """Centres of the clusters in feature space, and the similarities that are usual there.

    Attributes:
        centers: (K, D) float32 unit rows, mean direction of each cluster's images; zero for a cluster without images.
        least_similarity: (K,) float32, the similarity below which :data:`SHARE` of the training images lie whose
            nearest centre is that of the cluster; -1 if there are none.
    """

    centers: Tensor
    least_similarity: Tensor

    @classmethod
    def of(cls, features: Tensor, clusters: Tensor, n_clusters: int) -> Typicality:
        """Measure training images.

        Args:
            features: (N, D) float32, N of at least 1.
            clusters: (N,) int64, their clusters.
            n_clusters: K.
        """
        # In float64, so that the order of the sums plays no part in the float32 result.
        directions = F.normalize(features.double(), dim=1)
        sums = torch.zeros(n_clusters, features.shape[1], dtype=torch.float64, device=features.device)
        centers = F.normalize(sums.index_add_(0, clusters, directions), dim=1)
        measured = cls(centers.float(), torch.full((n_clusters,), -1.0, device=features.device))
        similarity, nearest = measured.nearest(features)
        for cluster in nearest.unique().tolist():
            own = similarity[nearest == cluster]
            measured.least_similarity[cluster] = own.quantile(SHARE) if len(own) < 1 << 24 else own.min()
        return measured

    def nearest(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cosine similarity of each image to the nearest centre, and the cluster of that centre.

        Args:
            features: (N, D) float32.

        Returns:
            (N,) float32 and (N,) int64. Clusters without training images are never the nearest.
        """
        similarity = F.normalize(features, dim=1) @ self.centers.T
        empty = ~self.centers.any(dim=1)
        best = similarity.masked_fill(empty, -torch.inf).max(dim=1)
        return best.values, best.indices

    def unlike(self, similarity: Tensor, nearest: Tensor) -> Tensor:
        """Return (N,) bool: whether an image is less similar than nearly all training images are."""
        return similarity < self.least_similarity[nearest]
