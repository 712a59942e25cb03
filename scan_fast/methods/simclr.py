"""SimCLR (Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ..models.heads import PretextModel
from .multi_view import LARGE, MultiViewMethod, MultiViewSettings, contrast


class SimCLRSettings(MultiViewSettings):
    """SimCLR: two views of an image attract, the views of all other images repel.

    With small views, each of them is compared with both large ones, and the loss is the mean over all pairs of views.

    Attributes:
        temperature: of the NT-Xent loss, which takes no less than 1e-8.
        anchors: ``both`` is the symmetric loss over all 2B rows. ``first`` takes the rows of the first view as anchors
            only, as the reference trains.
    """

    kind: Literal["simclr"] = "simclr"
    temperature: float = Field(default=0.1, ge=1e-8)
    anchors: Literal["both", "first"] = "both"

    def build(self, model: PretextModel, size: int) -> SimCLR:
        """Create the method."""
        return SimCLR(self, model, size)


class SimCLR(MultiViewMethod):
    """Trains with the NT-Xent loss of pairs of views."""

    def __init__(self, settings: SimCLRSettings, model: PretextModel, size: int) -> None:
        super().__init__(settings, model, size)
        self.settings = settings

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the NT-Xent loss."""
        rows = self.embed(images)
        pairs = [(0, 1), *((large, small) for small in range(LARGE, len(rows)) for large in range(LARGE))]
        temperature, anchors = self.settings.temperature, self.settings.anchors
        losses = [contrast(rows[a], rows[b], temperature, anchors=anchors) for a, b in pairs]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return loss, {"loss": loss}
