"""Operator that renders one view (augmented version) of each image by one native kernel, from uint8 images and recipes.

:class:`scan_fast.views.TorchRenderer` renders the same views in plain PyTorch, and the tests compare the two.
``csrc/augment/augment.h`` defines the layout of a recipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

from . import native

RECIPE_HEADER = 9
"""Words before the operations: top, left, height, width, flip, and top, left, bottom, right of the cutout."""
RECIPE_STEP = 7
"""Words of an operation: its number and six arguments."""


class Operation(IntEnum):
    """Operations of a recipe, numbered as in ``csrc/augment/augment.h``."""

    IDENTITY = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4
    GRAYSCALE = 5
    AUTOCONTRAST = 6
    EQUALIZE = 7
    SOLARIZE = 8
    POSTERIZE = 9
    SHARPNESS = 10
    NEAREST = 11
    BILINEAR = 12


def augment(
    images: Tensor,
    recipes: Tensor,
    size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
    *,
    indices: Tensor | None = None,
) -> Tensor:
    """Render one view of each image.

    Args:
        images: (N, H, W, 3) uint8.
        recipes: (n, RECIPE_HEADER + steps * RECIPE_STEP) int32 on the CPU; float arguments are stored as their bits.
        size: side of the view in pixels.
        scale, shift: per channel c the result is value * scale[c] + shift[c], rounded after each operation.
        dtype: float32 or bfloat16; uint8 for pixel values before normalisation and cutout.
        indices: (n,) int64 on the CPU, image of each recipe; by default recipe i is for image i, and n = N.

    Returns:
        (n, 3, size, size) in channels_last memory, or (n, size, size, 3) uint8; on the images' device.

    Raises:
        ValueError: for another shape or dtype, a box outside the image, an unknown index or operation, or a device
            without a compiled kernel.
    """
    if not native.has_kernel("augment", images.device.type):
        raise ValueError(f"images are on {images.device}, for which this build has no kernel that renders views")
    return torch.ops.scan_fast.augment.default(images, indices, recipes, size, scale, shift, dtype)


def _fake(
    images: Tensor,
    indices: Tensor | None,
    recipes: Tensor,
    size: int,
    scale: Sequence[float],
    shift: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    if images.ndim != 4 or recipes.ndim != 2:
        raise ValueError(
            f"images must be (N, H, W, 3) and recipes (n, words), got {tuple(images.shape)} and {tuple(recipes.shape)}"
        )
    out = images.new_empty((recipes.shape[0], size, size, 3), dtype=dtype)
    return out if dtype == torch.uint8 else out.permute(0, 3, 1, 2)


if native.is_available():
    torch.library.register_fake("scan_fast::augment", _fake)
