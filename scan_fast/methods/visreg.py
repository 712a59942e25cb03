"""VISReg: embeddings are compared with a normal distribution by centre, scale and sorted projections.

Source: Wu, Balestriero and Levine, 2026, https://arxiv.org/abs/2606.02572.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .gaussian import GaussianSettings, Measure


def visreg(z: Tensor, directions: Tensor) -> Tensor:
    """Measure how far embeddings are from a standard normal distribution: in centre, in scale and in shape.

    The shape is compared after centre and scale have been taken out: the sorted projections on each direction against
    the quantiles of the normal distribution. Its gradient leaves the scale alone, so after a collapse the term of the
    scale spreads the embeddings again. (The authors' code holds the scale constant in the gradient. The finite sample's
    shape term then shrinks the embeddings, and outweighs the term of the scale near a collapse.)

    Args:
        z: (B, D) float32 embeddings, not normalised.
        directions: (K, D) float32 directions of length one.

    Returns:
        The sum of the three mean squared differences, a float32 scalar; near 0 for a standard normal distribution.
    """
    mean = z.mean(dim=0)
    centred = z - mean
    deviation = (centred.square().mean(dim=0) + 1e-12).sqrt()
    projections = directions @ (centred / deviation).T
    ranks = torch.arange(1, len(z) + 1, device=z.device, dtype=torch.float32)
    quantiles = torch.special.ndtri(ranks / (len(z) + 1))
    shape = (projections.sort(dim=1).values - quantiles).square().mean()
    return mean.square().mean() + (deviation - 1).square().mean() + shape


class VISRegSettings(GaussianSettings):
    """VISReg: the embeddings of an image's views approach their mean, those of a batch a normal distribution."""

    kind: Literal["visreg"] = "visreg"
    weight: float = Field(default=1.5, ge=0)
    directions: int = Field(default=1024, ge=1)

    @property
    def measure(self) -> Measure:
        """:func:`visreg`."""
        return visreg
