"""SimCLR (Chen et al., ICML 2020, https://arxiv.org/abs/2002.05709)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ..losses import nt_xent
from ..models.heads import PretextModel
from ..views.parameters import SimCLRView, View
from .base import MethodSettings, PretextMethod


class SimCLRSettings(MethodSettings):
    """SimCLR: two views of an image attract, the views of all other images repel.

    Attributes:
        temperature: of the NT-Xent loss, which takes no less than 1e-8.
        anchors: ``both`` is the symmetric loss over all 2B rows. ``first`` takes the rows of the first view as anchors
            only, as the reference trains.
        view: the random view; an open size is the source's.
        resolutions: smaller views at first: pairs (share, size) mean ``size`` pixels up to that share of the epochs,
            then the view's own size. ``[[0.4, 16], [0.7, 24]]`` takes 0.6 of the work at 32 pixels.
    """

    kind: Literal["simclr"] = "simclr"
    temperature: float = Field(default=0.1, ge=1e-8)
    anchors: Literal["both", "first"] = "both"
    view: View = SimCLRView(kind="simclr", size=None)
    resolutions: tuple[tuple[float, int], ...] = ()

    @model_validator(mode="after")
    def _check_resolutions(self) -> Self:
        shares = [share for share, _ in self.resolutions]
        if not all(0 < share < 1 for share in shares) or shares != sorted(set(shares)):
            raise ValueError(f"resolutions must have shares that rise between 0 and 1, got {shares}")
        if any(size < 1 for _, size in self.resolutions):
            raise ValueError(f"resolutions must have sizes of at least one pixel, got {list(self.resolutions)}")
        return self

    def side(self, size: int) -> int:
        """Return the view's side."""
        return self.view.resolved(size).side

    def build(self, model: PretextModel, size: int) -> SimCLR:
        """Create the method."""
        return SimCLR(self, model, size)


class SimCLR(PretextMethod):
    """Trains with the NT-Xent loss of two views."""

    def __init__(self, settings: SimCLRSettings, model: PretextModel, size: int) -> None:
        super().__init__(model)
        self.settings = settings
        self._view = settings.view.resolved(size)

    def views(self, epoch: int, epochs: int) -> Sequence[View]:
        """Return the same view twice; its size follows ``resolutions``."""
        view = self._view
        for share, size in self.settings.resolutions:
            if epoch < round(share * epochs):
                view = view.model_copy(update={"size": size})
                break
        return view, view

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the NT-Xent loss. Both views pass the network together, so they share batch statistics."""
        z0, z1 = self.model(torch.cat(list(images))).chunk(2)
        loss = nt_xent(z0, z1, self.settings.temperature, anchors=self.settings.anchors)
        return loss, {"loss": loss}
