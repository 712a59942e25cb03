"""Forward passes without training: features and predictions of every image of a source, in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..data.loader import prefetch
from ..data.sources import Source
from ..views.maker import ViewMaker
from ..views.parameters import View
from .compilation import uncompiled
from .context import Context


def forward_all(context: Context, model: nn.Module, function: Callable[[Tensor], Tensor], source: Source) -> Tensor:
    """Apply a part of a run's model to all images of a source; see :func:`forward_views`. The result stays there."""
    views = context.views_of(source, "evaluation")
    size = context.config.evaluation.batch_size
    with uncompiled(context.config.runtime.compile):
        return forward_views(model, function, views, context.plain_view, size, context.autocast())


@torch.no_grad()
def forward_views(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    views: ViewMaker,
    view: View,
    batch_size: int,
    precision: AbstractContextManager[None] | None = None,
    epoch: int = 0,
) -> Tensor:
    """Apply ``function`` to the views of all images of a source, without a host synchronisation.

    Args:
        model: in evaluation mode during the call; its modes are restored.
        function: maps views (B, 3, S, S) to features (B, D), or to the logits of all heads (H, B, C).
        views: the source with its renderer.
        view: the view of each image.
        batch_size: images at a time.
        precision: a context for the forward passes, such as autocast.
        epoch: selects the views' parameters if they are random.

    Returns:
        (N, D), or (H, N, C), float32 on the views' device.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = torch.arange(len(views.source)).split(batch_size)

    def images_of(indices: Tensor) -> Tensor:
        return views(view, indices, epoch=epoch, view_index=0)

    with precision or nullcontext():
        batches = map(images_of, rows) if views.source.resident else prefetch(images_of, rows)
        results = [function(images).float() for images in batches]
    for module, mode in modes:
        module.training = mode
    return torch.cat(results, dim=-2)
