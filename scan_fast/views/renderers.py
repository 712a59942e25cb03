"""Choice of the renderer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from ..data.datasets import DataConfig, Splits
from ..ops import native, trust
from .maker import Renderer
from .render_dali import DaliRenderer
from .render_fused import FusedRenderer
from .render_torch import TorchRenderer

RendererName = Literal["torch", "dali", "fused"]


def automatic_renderer(device: torch.device | str) -> RendererName:
    """Return the renderer of ``data.renderer=auto``: fused if its kernel is compiled and trusted on the device, else
    torch.

    The first call on a GPU may run the kernel's self-test (:mod:`scan_fast.ops.trust`).
    """
    device = torch.device(device)
    trusted = native.has_kernel("augment", device.type) and trust.takes_kernel_on("augment", device)
    return "fused" if trusted else "torch"


def renderer_for(
    name: Literal["auto"] | RendererName, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Renderer:
    """Return a renderer by name, for images normalised with `mean` and `std`.

    Raises:
        DataError: if the requested renderer cannot run on the device.
        MissingPackageError: if its package is not installed.
    """
    chosen = automatic_renderer(device) if name == "auto" else name
    if chosen == "dali":
        return DaliRenderer(mean, std, device)
    return FusedRenderer(mean, std, device) if chosen == "fused" else TorchRenderer(mean, std, device)


def make_renderer(config: DataConfig, splits: Splits, device: torch.device) -> Renderer:
    """Return the renderer that a configuration requests.

    Raises:
        DataError: if it cannot run on the device.
        MissingPackageError: if its package is not installed.
    """
    return renderer_for(config.renderer, splits.mean, splits.std, device)
