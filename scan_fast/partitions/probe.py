"""A linear head that reproduces a partition: the model that puts new images into the groups."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..threads import one_thread
from .score import group_sums
from .space import Indices, Rows, drawn_rows, principal_basis

PENALTY = 1 / 3
"""Weight of half the squared norm of the weights against the sum of the cross-entropies, as C = 3 in scikit-learn. It
keeps the head from reproducing single images that lie among another group."""
ITERATIONS = 200


@dataclass(frozen=True)
class LinearHead:
    """Logits are ``rows @ weight.T + bias`` for unit features.

    Attributes:
        weight: (K, D) float32.
        bias: (K,) float32.
    """

    weight: Tensor
    bias: Tensor

    def logits(self, rows: Rows) -> Tensor:
        """Return the (N, K) logits of unit features (N, D)."""
        return torch.from_numpy(rows) @ self.weight.T + self.bias


@one_thread()
def fit_head(labels: Indices, rows: Rows, k: int, seed: int) -> LinearHead:
    """Fit a head to a partition by multinomial logistic regression on the leading principal components.

    Args:
        labels: (N,) group of each image, from 0 to K - 1.
        rows: (N, D) unit features.
        k: K.
        seed: draws the images, see :func:`.space.drawn_rows`.
    """
    mean, basis = principal_basis(rows)
    chosen = drawn_rows(len(rows), seed)
    # In float64, so that the iterations end at the minimum rather than at rounding.
    inputs = torch.from_numpy((rows[chosen] - mean) @ basis).double()
    targets = torch.from_numpy(labels[chosen])
    weight = torch.zeros(k, inputs.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        penalty = PENALTY / 2 * weight.square().sum() / len(inputs)
        value = F.cross_entropy(inputs @ weight.T + bias, targets) + penalty
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    full = weight.detach() @ torch.from_numpy(basis).double().T
    shift = bias.detach() - full @ torch.from_numpy(mean).double()
    return LinearHead(full.float(), shift.float())


SHARPNESS = 10.0
"""Factor on squared distances to group means, at which neighbouring groups still share an image."""


def nearest_mean_head(labels: Indices, rows: Rows, k: int) -> LinearHead:
    """Return the head whose logits fall with the squared distance to the groups' mean features: that of k-means.

    Args:
        labels: (N,) group of each image, from 0 to K - 1.
        rows: (N, D) unit features.
        k: K.
    """
    sizes = np.maximum(np.bincount(labels, minlength=k), 1)
    means = torch.from_numpy(group_sums(labels, rows, k) / sizes[:, None])
    return LinearHead((2 * SHARPNESS * means).float(), (-SHARPNESS * means.square().sum(dim=1)).float())
