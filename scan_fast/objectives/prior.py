"""Relative sizes of the clusters, as the objectives that spread images over clusters expect them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from .. import distributed
from ..errors import ConfigError
from ..ops.collectives import mean_over_ranks
from .base import ObjectiveSettings

Prior = Literal["uniform", "estimated"] | Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=2)]
"""The type of a setting ``prior``: equal sizes, those of the start, or relative sizes in any order and scale."""

SMALLEST = 1e-8
"""A mean probability below this counts as this, as in the SCAN loss."""


def check_prior(prior: Prior, n_clusters: int) -> None:
    """Check that given sizes are as many as the clusters.

    Raises:
        ConfigError: names both numbers.
    """
    if isinstance(prior, tuple) and len(prior) != n_clusters:
        raise ConfigError(f"prior must have one size for each of the {n_clusters} clusters, got {len(prior)} sizes")


def mean_of_batch(probabilities: Tensor) -> Tensor:
    """Return the mean over the images of a batch, those of all ranks if there are several: (H, C) for (H, B, C).

    The gradient is that of what every rank computes of the mean alike.
    """
    mean = probabilities.mean(dim=-2)
    return mean_over_ranks(mean) if distributed.several() else mean


class PriorSettings(ObjectiveSettings):
    """Base of the settings of an objective with a prior.

    Attributes:
        prior: relative sizes of the clusters.
    """

    prior: Prior = "uniform"

    @property
    def needs_start(self) -> bool:
        """True if the heads must start from clusters."""
        return self.prior == "estimated"

    def check(self, n_clusters: int) -> None:
        """Check the number of given sizes."""
        check_prior(self.prior, n_clusters)


class ClusterPrior:
    """Keeps the logarithms of the relative sizes of each head's clusters, from the start on.

    Args:
        setting: ``"uniform"`` keeps nothing. ``"estimated"`` counts the clusters of the start. Sizes are given to the
            clusters of the start by rank: the largest size to the largest cluster.
    """

    def __init__(self, setting: Prior) -> None:
        self.setting = setting
        self._log: Tensor | None = None

    @property
    def uniform(self) -> bool:
        """True if all clusters are expected to have the same size."""
        return self.setting == "uniform"

    @torch.no_grad()
    def start(self, logits: Callable[[], Tensor]) -> None:
        """Set the sizes from the initial logits (H, N, C) of all images; a uniform prior does not ask for them."""
        if self.uniform:
            return
        values = logits()
        labels, clusters = values.argmax(dim=-1), values.shape[-1]
        counts = torch.stack([torch.bincount(row, minlength=clusters) for row in labels])
        if isinstance(self.setting, tuple):
            check_prior(self.setting, clusters)
            sizes = torch.tensor(sorted(self.setting), dtype=torch.float64, device=counts.device)
            # Stable, so that clusters of one size get theirs in the order of their numbers.
            ranks = counts.argsort(dim=-1, stable=True).argsort(dim=-1)
            relative = sizes[ranks]
        else:
            relative = counts.double() + 1  # a cluster that is empty at the start keeps a finite logarithm
        self._log = (relative / relative.sum(dim=-1, keepdim=True)).log().float()

    def entropy(self, mean: Tensor) -> Tensor:
        """Return the entropy of mean probabilities (H, C), each of which counts as at least 1e-8: (H,)."""
        bounded = mean.clamp_min(SMALLEST)
        return -(bounded * bounded.log()).sum(dim=-1)

    def divergence(self, mean: Tensor, entropy: Tensor | None = None) -> Tensor:
        """Return KL(mean || prior) of each head, (H,).

        Args:
            mean: (H, C) mean probabilities, bounded as in :meth:`entropy`.
            entropy: (H,) their entropies, if they are known.

        Raises:
            RuntimeError: if there was no start.
        """
        known = self.entropy(mean) if entropy is None else entropy
        return -known - (mean.clamp_min(SMALLEST) * self.log(mean)).sum(dim=-1)

    def log(self, like: Tensor) -> Tensor:
        """Return the logarithms of the sizes, (H, C) in the dtype and on the device of ``like``."""
        if self._log is None:
            raise RuntimeError("the sizes of the clusters are known after start() only")
        return self._log.to(like)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold."""
        return {} if self._log is None else {"log_prior": self._log}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._log = state.get("log_prior")
