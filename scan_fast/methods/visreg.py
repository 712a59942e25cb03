"""VISReg: embeddings are compared with a normal distribution by centre, scale and sorted projections.

Source: Wu, Balestriero and Levine, 2026, https://arxiv.org/abs/2606.02572.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..ops.gaussian import visreg
from .gaussian import GaussianSettings, Measure


class VISRegSettings(GaussianSettings):
    """VISReg: the embeddings of an image's views approach their mean, those of a batch a normal distribution."""

    kind: Literal["visreg"] = "visreg"
    weight: float = Field(default=1.5, ge=0)
    directions: int = Field(default=1024, ge=1)

    @property
    def measure(self) -> Measure:
        """:func:`~scan_fast.losses.visreg_loss`."""
        return visreg
