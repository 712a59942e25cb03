"""Views of methods that compare views of an image: two large ones and, for multi-crop, several small ones.

Multi-crop is from SwAV (Caron et al., NeurIPS 2020, https://arxiv.org/abs/2006.09882): a small view shows a part of the
image in few pixels, so it costs a fraction of a large one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from .. import distributed
from ..losses import nt_xent
from ..models.heads import PretextModel
from ..ops.nt_xent import nt_xent_distributed
from ..views.parameters import SimCLRView, View
from .base import MethodSettings, PretextMethod

LARGE = 2
"""Number of large views of each image."""


class MultiViewSettings(MethodSettings):
    """Settings of the views.

    Attributes:
        view: the random view that two large views are drawn from; an open size is the source's.
        small_views: further views of each image, smaller and of a part of the image (multi-crop).
        small_view: the view that these are drawn from; an open size is half the large view's.
        resolutions: smaller views at first: pairs (share, size) mean large views of ``size`` pixels up to that share of
            the epochs, then the view's own size. ``[[0.4, 16], [0.7, 24]]`` takes 0.6 of the work at 32 pixels.
        batch_statistics: ``joint`` passes views of one size through the network together, so that they share the
            statistics of its batch normalisation, as the reference does. ``per_view`` passes each view alone.
    """

    view: View = SimCLRView(kind="simclr", size=None)
    small_views: int = Field(default=0, ge=0, le=64)
    small_view: View = SimCLRView(kind="simclr", size=None, scale=(0.05, 0.4))
    resolutions: tuple[tuple[float, int], ...] = ()
    batch_statistics: Literal["joint", "per_view"] = "joint"
    least_images: ClassVar[int] = 2

    @model_validator(mode="after")
    def _check_resolutions(self) -> Self:
        shares = [share for share, _ in self.resolutions]
        if not all(0 < share < 1 for share in shares) or shares != sorted(set(shares)):
            raise ValueError(f"resolutions must have shares that rise between 0 and 1, got {shares}")
        if any(size < 1 for _, size in self.resolutions):
            raise ValueError(f"resolutions must have sizes of at least one pixel, got {list(self.resolutions)}")
        return self

    def side(self, size: int) -> int:
        """Return the large view's side."""
        return self.view.resolved(size).side

    def passes(self, size: int) -> float:
        """Return the pixels of all views of an image relative to one large view."""
        return LARGE + self.small_views * (self.small(size).side / self.side(size)) ** 2

    def small(self, size: int) -> View:
        """Return the small view for a source of ``size`` pixels."""
        return self.small_view.resolved(max(1, self.side(size) // 2))


class MultiViewMethod(PretextMethod):
    """Base of methods that compare views."""

    def __init__(self, settings: MultiViewSettings, model: PretextModel, size: int) -> None:
        super().__init__(model)
        self._resolutions = settings.resolutions
        self._view = settings.view.resolved(size)
        self._small = (settings.small(size),) * settings.small_views
        self._per_view = settings.batch_statistics == "per_view"

    def views(self, epoch: int, epochs: int) -> Sequence[View]:
        """Return the large view twice, its size by ``resolutions``, and the small views."""
        view = self._view
        for share, size in self._resolutions:
            if epoch < round(share * epochs):
                view = view.model_copy(update={"size": size})
                break
        return (view,) * LARGE + self._small

    def embed(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Return the embeddings (B, D) of each view."""
        return self.embeddings(self.model, images[:LARGE], images[LARGE:])

    def embeddings(self, network: Callable[[Tensor], Tensor], *groups: Sequence[Tensor]) -> list[Tensor]:
        """Return what a network makes of each view.

        Args:
            network: maps images (n, 3, S, S) to embeddings (n, D).
            groups: views (B, 3, S, S) of one size each; a group may be empty. With joint statistics the views of a
                group pass together.
        """
        if self._per_view:
            return [network(view) for group in groups for view in group]
        return [rows for group in groups if group for rows in network(torch.cat(list(group))).chunk(len(group))]


def contrast(
    z0: Tensor, z1: Tensor, temperature: float, *, anchors: Literal["both", "first"], queue: Tensor | None = None
) -> Tensor:
    """Return NT-Xent of two views (B, D), see :func:`scan_fast.nt_xent`; the rows of all ranks are negatives.

    With several ranks it is the mean over this rank's anchors. Every rank passes the same queue.
    """
    if distributed.several():
        return nt_xent_distributed(z0, z1, temperature, anchors=anchors, queue=queue, impl="auto")
    return nt_xent(z0, z1, temperature, anchors=anchors, queue=queue)
