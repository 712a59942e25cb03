"""Fused renderer: renders one view per image by one native kernel, with the pixels of the torch renderer.

The parameters of a view are encoded as a recipe per image (see :mod:`scan_fast.ops.augment`), which the kernel
executes. Pixel values equal those of the torch renderer except for the resize: here it is PIL's fixed-point arithmetic,
there float32, so a value may differ by one before the colour operations. They are the same on every device, for any
number of threads and in any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import DataError
from ..ops import native
from ..ops.augment import RECIPE_HEADER, RECIPE_STEP, Operation, augment
from . import geometry
from .normalization import scale_and_shift
from .parameters import STRONG_INDEX, STRONG_OPERATIONS, AffineView, Params, SimCLRView, StrongView, View

_JITTER = (Operation.BRIGHTNESS, Operation.CONTRAST, Operation.SATURATION, Operation.HUE)
_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_OPERATION = {
    "identity": Operation.IDENTITY,
    "autocontrast": Operation.AUTOCONTRAST,
    "equalize": Operation.EQUALIZE,
    "solarize": Operation.SOLARIZE,
    "color": Operation.SATURATION,
    "contrast": Operation.CONTRAST,
    "brightness": Operation.BRIGHTNESS,
    "sharpness": Operation.SHARPNESS,
    "posterize": Operation.POSTERIZE,
    **dict.fromkeys(_GEOMETRIC, Operation.NEAREST),
}
_STRONG = torch.tensor([_OPERATION[name] for name, _, _ in STRONG_OPERATIONS], dtype=torch.int32)


class FusedRenderer:
    """Render views with the native kernel.

    Args:
        mean, std: per-channel normalisation in [0, 1].
        device: device to render on; images are moved there.
        dtype: dtype of the result, float32 or bfloat16.

    Raises:
        DataError: if this build has no kernel for the device.
        ValueError: for an invalid mean, std or dtype.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._scale, self._shift = scale_and_shift(mean, std)
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype must be float32 or bfloat16, got {dtype}")
        self.device = torch.device(device)
        self.dtype = dtype
        if not native.has_kernel("augment", self.device.type):
            raise DataError(
                f"the fused renderer has no compiled kernel for {self.device} here; use data.renderer=torch or auto"
            )

    def __call__(self, images: Tensor, view: View, params: Params, indices: Tensor | None = None) -> Tensor:
        """Render one view.

        Args:
            images: (n, H, W, 3) uint8 on any device; with `indices`, (N, H, W, 3).
            view: view specification with a resolved size.
            params: parameters from ``view.sample`` for these images.
            indices: (n,) int64 on the CPU, selects images of a larger tensor without a copy.

        Returns:
            (n, 3, size, size) normalised, channels_last, in the renderer's dtype and on its device.
        """
        return self._render(images, view, params, self.dtype, indices)

    def pixels(self, images: Tensor, view: View, params: Params, indices: Tensor | None = None) -> Tensor:
        """Render one view without normalisation and cutout: (n, size, size, 3) uint8."""
        return self._render(images, view, params, torch.uint8, indices)

    @torch.no_grad()
    def _render(self, images: Tensor, view: View, params: Params, dtype: torch.dtype, indices: Tensor | None) -> Tensor:
        images = images.to(self.device, non_blocking=True)
        return augment(images, recipes(view, params), view.side, self._scale, self._shift, dtype, indices=indices)


def recipes(view: View, params: Params) -> Tensor:
    """Encode the parameters of a view as recipes for the kernel: (n, words) int32 on the CPU."""
    params = {name: value.cpu() for name, value in params.items()}
    operations, arguments = operations_of(view, params)
    n, steps = operations.shape
    out = torch.zeros((n, RECIPE_HEADER + steps * RECIPE_STEP), dtype=torch.int32)
    for word, name in enumerate(("top", "left", "height", "width", "flip")):
        out[:, word] = params[name]
    if "cutout" in params:
        out[:, 5:9] = params["cutout"]
    rows = out[:, RECIPE_HEADER:].view(n, steps, RECIPE_STEP)
    rows[..., 0] = operations
    rows[..., 1 : 1 + arguments.shape[-1]] = arguments
    return out


def _bits(values: Tensor) -> Tensor:
    return values.float().view(torch.int32)


def operations_of(view: View, params: Params) -> tuple[Tensor, Tensor]:
    """Return the operations after the crop, (n, steps) int32, and their arguments, (n, steps, 1 or 6) int32.

    Arguments are the bits of floats, or for a nearest map the fixed-point values of :func:`geometry.fixed_point`.
    """
    n = len(params["flip"])
    if isinstance(view, SimCLRView):
        amounts = torch.stack([params[name] for name in ("brightness", "contrast", "saturation", "hue")], dim=1)
        neutral = torch.tensor([1.0, 1.0, 1.0, 0.0])
        chosen = torch.where(amounts != neutral, torch.tensor(_JITTER, dtype=torch.int32), int(Operation.IDENTITY))
        operations = torch.cat(
            (chosen.gather(1, params["order"]), params["grayscale"].int().mul_(int(Operation.GRAYSCALE)).unsqueeze(1)),
            dim=1,
        )
        ordered = torch.cat((amounts.gather(1, params["order"]), torch.zeros(n, 1)), dim=1)
        return operations, _bits(ordered).unsqueeze(2)
    if isinstance(view, StrongView):
        kind, amount = params["operation"], params["magnitude"]
        arguments = torch.zeros((*kind.shape, 6), dtype=torch.int32)
        arguments[..., 0] = _bits(amount)
        geometric = _STRONG[kind] == int(Operation.NEAREST)
        matrix = geometry.matrices(kind[geometric], amount[geometric], view.side, STRONG_INDEX)
        arguments[geometric] = geometry.fixed_point(matrix)
        return _STRONG[kind], arguments
    if isinstance(view, AffineView):
        factors = torch.stack((params["brightness"], params["contrast"]), dim=1)
        enhance = torch.tensor([Operation.BRIGHTNESS, Operation.CONTRAST], dtype=torch.int32)
        chosen = torch.where(factors != 1, enhance, int(Operation.IDENTITY))
        operations = torch.cat((torch.full((n, 1), int(Operation.BILINEAR), dtype=torch.int32), chosen), dim=1)
        arguments = torch.zeros((n, 3, 6), dtype=torch.int32)
        arguments[:, 0] = _bits(params["matrix"])
        arguments[:, 1:, 0] = _bits(factors)
        return operations, arguments
    return torch.zeros((n, 0), dtype=torch.int32), torch.zeros((n, 0, 1), dtype=torch.int32)
