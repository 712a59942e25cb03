"""SIGReg: embeddings are compared with a normal distribution by their characteristic functions.

Source: LeJEPA (Balestriero and LeCun, 2025, https://arxiv.org/abs/2511.08544).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ..ops.gaussian import sigreg
from .gaussian import GaussianSettings, Measure


class SIGRegSettings(GaussianSettings):
    """SIGReg: the embeddings of an image's views approach their mean, those of a batch a normal distribution."""

    kind: Literal["sigreg"] = "sigreg"
    weight: float = Field(default=2.5, ge=0)

    @property
    def measure(self) -> Measure:
        """:func:`~scan_fast.losses.sigreg_loss`."""
        return sigreg
