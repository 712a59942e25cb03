"""Forward passes without training over all images of a source."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from ..data.loader import prefetch
from .maker import ViewMaker
from .parameters import View


@torch.no_grad()
def forward_views(
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    views: ViewMaker,
    view: View,
    batch_size: int,
    precision: AbstractContextManager[None] | None = None,
    epoch: int = 0,
    done: Callable[[int], None] | None = None,
) -> Tensor:
    """Apply ``function`` to one view of every image of a source, in order, without a host synchronisation.

    Args:
        model: the network that ``function`` calls; in evaluation mode during the call, and its modes are restored.
        function: maps views (B, 3, S, S) to features (B, D), or to the logits of all heads (H, B, C).
        views: the source with its renderer.
        view: the view of each image.
        batch_size: images at a time.
        precision: a context for the forward passes, such as autocast.
        epoch: selects the views' parameters if they are random.
        done: called with the number of images of each batch once it is on its way.

    Returns:
        (N, D), or (H, N, C), float32 on the views' device.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    rows = torch.arange(len(views.source)).split(batch_size)

    def images_of(indices: Tensor) -> Tensor:
        return views(view, indices, epoch=epoch, view_index=0)

    try:
        with precision or nullcontext():
            batches = map(images_of, rows) if views.source.resident else prefetch(images_of, rows)
            results = []
            for images in batches:
                results.append(function(images).float())
                if done is not None:
                    done(len(images))
    finally:
        for module, mode in modes:
            module.training = mode
    return torch.cat(results, dim=-2)
