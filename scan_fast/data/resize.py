"""Resizing of whole square images in a batch, with antialias, as PIL does it up to rounding."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

#: Resampling filters.
Interpolation = Literal["bilinear", "bicubic"]

_CHUNK = 1024


def resize_squares(images: Tensor, size: int, interpolation: Interpolation) -> Tensor:
    """Resize images.

    Args:
        images: (n, E, E, C) uint8, on any device.
        size: side of the result in pixels.
        interpolation: the filter; "bicubic" is PIL's, with the parameter -0.5.

    Returns:
        (n, size, size, C) uint8, on the same device.
    """
    if size == images.shape[1]:
        return images.contiguous()
    resized = images.new_empty((len(images), size, size, images.shape[-1]))
    for start in range(0, len(images), _CHUNK):
        planar = images[start : start + _CHUNK].permute(0, 3, 1, 2).float()
        if interpolation == "bilinear":
            planar = torch.nn.functional.interpolate(planar, size=(size, size), mode="bilinear", antialias=True)
        else:
            planar = _bicubic(planar, size)
        resized[start : start + _CHUNK] = planar.round_().clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    return resized


def _bicubic(planar: Tensor, size: int) -> Tensor:
    """Return (n, C, size, size) of (n, C, E, E) pixel values, not rounded.

    PyTorch's own filter for floating-point images has another parameter than PIL's if it enlarges.
    """
    taps = _cubic_taps(planar.shape[-1], size).to(planar.device)
    # As in PIL, values are whole pixel values between the two passes.
    return taps.T @ (planar @ taps).round_().clamp_(0, 255)


@lru_cache(maxsize=8)
def _cubic_taps(source: int, size: int) -> Tensor:
    """Return the (source, size) filter matrix: column j has the weights of the source pixels for output pixel j."""
    ratio = source / size
    stretch = max(ratio, 1.0)
    centre = (torch.arange(size, dtype=torch.float64) + 0.5) * ratio
    x = ((torch.arange(source, dtype=torch.float64).unsqueeze(1) + 0.5 - centre) / stretch).abs()
    a = -0.5
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    taps = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    return (taps / taps.sum(dim=0)).float()
