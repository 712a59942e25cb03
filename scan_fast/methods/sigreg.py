"""SIGReg: embeddings are compared with a normal distribution by their characteristic functions.

Source: LeJEPA (Balestriero and LeCun, 2025, https://arxiv.org/abs/2511.08544).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from .gaussian import GaussianSettings, Measure

POINTS = 10
"""Points on [-RANGE, RANGE] at which characteristic functions are compared."""
RANGE = 3.0


def sigreg(z: Tensor, directions: Tensor) -> Tensor:
    """Measure how far embeddings are from a standard normal distribution, by their projections on directions.

    For each direction, the characteristic function phi of the batch's projections is compared with that of the normal
    distribution: the integral of exp(-t^2 / 2) |phi(t) - exp(-t^2 / 2)|^2 over t (Epps and Pulley, 1983).

    Args:
        z: (B, D) float32 embeddings, not normalised.
        directions: (K, D) float32 directions of length one.

    Returns:
        The mean over the directions, a float32 scalar; near 0 for a standard normal distribution.
    """
    projections = z @ directions.T
    points = torch.linspace(-RANGE, RANGE, POINTS)[: POINTS // 2].tolist()  # the integrand is even in t
    total = torch.zeros((), device=z.device)
    for t in points:
        angles, normal = t * projections, math.exp(-t * t / 2)
        distance = (angles.cos().mean(dim=0) - normal).square() + angles.sin().mean(dim=0).square()
        total = total + normal * distance.mean()
    return total * (2 * 2 * RANGE / (POINTS - 1))


class SIGRegSettings(GaussianSettings):
    """SIGReg: the embeddings of an image's views approach their mean, those of a batch a normal distribution."""

    kind: Literal["sigreg"] = "sigreg"
    weight: float = Field(default=2.5, ge=0)

    @property
    def measure(self) -> Measure:
        """:func:`sigreg`."""
        return sigreg
