"""Forward passes without training: features and predictions of every image of a source, in order."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..data.sources import Source
from ..views.inference import forward_views
from .compilation import uncompiled
from .context import Context


def forward_all(
    context: Context,
    model: nn.Module,
    function: Callable[[Tensor], Tensor],
    source: Source,
    *,
    gather: bool = True,
) -> Tensor:
    """Apply a part of a run's model to all images of a source; see :func:`.views.inference.forward_views`."""
    views = context.views_of(source, "evaluation")
    size = context.config.evaluation.batch_size
    with (
        uncompiled(context.config.runtime.compile),
        context.tracker.counted("images passed through the network", len(source)) as done,
    ):
        return forward_views(
            model, function, views, context.plain_view, size, context.autocast(), done=done, gather=gather
        )
