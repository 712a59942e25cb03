"""Forward passes without training over all images of a source."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from .. import distributed
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
    *,
    gather: bool = True,
) -> Tensor:
    """Apply ``function`` to one view of every image of a source, in order, without a host synchronisation.

    With several ranks, each takes its share of the batches (:func:`scan_fast.distributed.share`).

    Args:
        model: the network that ``function`` calls; in evaluation mode during the call, and its modes are restored.
        function: maps views (B, 3, S, S) to features (B, D), or to the logits of all heads (H, B, C).
        views: the source with its renderer.
        view: the view of each image.
        batch_size: images at a time.
        precision: a context for the forward passes, such as autocast.
        epoch: selects the views' parameters if they are random.
        done: called with the number of images of each batch once it is on its way.
        gather: return the rows of all ranks; otherwise those of this rank's share.

    Returns:
        (N, D), or (H, N, C), float32 on the views' device.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = len(views.source)
    begin, end = distributed.share(total, batch_size)
    # A rank without a share needs the shape of a result.
    rows = torch.arange(begin, end).split(batch_size) if end > begin else (torch.arange(min(1, total)),)

    def images_of(indices: Tensor) -> Tensor:
        return views(view, indices, epoch=epoch, view_index=0)

    try:
        with precision or nullcontext():
            batches = map(images_of, rows) if views.source.resident else prefetch(images_of, rows)
            results = []
            for images in batches:
                results.append(function(images).float())
                if done is not None:
                    # As many on the other ranks.
                    done(len(images) * (distributed.current().world if distributed.several() else 1))
    finally:
        for module, mode in modes:
            module.training = mode
    result = torch.cat(results, dim=-2)
    own = result if end > begin else result.narrow(-2, 0, 0)
    if not gather:
        return own
    counts = [last - first for first, last in distributed.shares(total, batch_size)]
    return distributed.all_rows(own, counts, dim=-2)
