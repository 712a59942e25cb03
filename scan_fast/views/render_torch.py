"""Renderer in plain torch: renders one view per image of a batch, each with its own parameters, on any device.

Results are those of torchvision on PIL images: integer pixel values after every operation, PIL's rounding and
truncation, antialiased bilinear crops, nearest resampling with black fill for geometric operations. Images are (n, 3,
H, W) float32 with integer values 0..255. float32 represents every intermediate of PIL's integer arithmetic exactly. The
arithmetic is in `color` (pointwise and neighbourhood operations) and `geometry`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import color, geometry
from .normalization import scale_and_shift
from .parameters import STRONG_INDEX, AffineView, Params, SimCLRView, StrongView, View

# On a CPU, a batch is rendered in chunks that stay in its caches: a third less time for images of 224 pixels.
_CHUNK_BYTES = 3 << 20

_GEOMETRIC = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
_POINTWISE = ("autocontrast", "equalize", "solarize", "contrast", "brightness", "posterize")


class TorchRenderer:
    """Render views with torch operations.

    Args:
        mean, std: per-channel normalisation in [0, 1].
        device: device to render on; images and parameters are moved there.
        dtype: dtype of the result.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        scale, shift = scale_and_shift(mean, std)
        self.device = torch.device(device)
        self.dtype = dtype
        self._scale, self._shift = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1) for values in (scale, shift)
        )

    @torch.no_grad()
    def __call__(self, images: Tensor, view: View, params: Params) -> Tensor:
        """Render one view.

        Args:
            images: (n, H, W, 3) uint8 on any device.
            view: view specification with a resolved size.
            params: parameters from ``view.sample`` for these images.

        Returns:
            (n, 3, size, size) normalised, channels_last, in the renderer's dtype and on its device.
        """
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != torch.uint8:
            raise ValueError(f"images must be (n, H, W, 3) uint8, got {tuple(images.shape)} {images.dtype}")
        shape = (len(images), 3, view.side, view.side)
        out = torch.empty(shape, dtype=self.dtype, device=self.device, memory_format=torch.channels_last)
        chunk = len(images)
        if self.device.type == "cpu":
            chunk = _CHUNK_BYTES // (12 * max(view.side**2, images.shape[1] * images.shape[2]))
        for start in range(0, len(images), max(1, chunk)):
            rows = slice(start, start + max(1, chunk))
            part = {name: value[rows] for name, value in params.items()}
            self._normalise(self.pixels(images[rows], view, part), part.get("cutout"), out[rows])
        return out

    @torch.no_grad()
    def pixels(self, images: Tensor, view: View, params: Params) -> Tensor:
        """Render one view without normalisation and cutout: (n, 3, size, size) float32 integer pixel values."""
        if len(images) == 0:
            return torch.empty((0, 3, view.side, view.side), device=self.device)
        params = {name: value.to(self.device, non_blocking=True) for name, value in params.items()}
        planar = images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        x = torch.empty(planar.shape, device=self.device).copy_(planar)
        x = geometry.crop_resize(x, view.side, params)
        if isinstance(view, SimCLRView):
            _jitter(x, params)
        elif isinstance(view, StrongView):
            for step in range(view.operations):
                x = _strong_operation(x, params["operation"][:, step], params["magnitude"][:, step])
        elif isinstance(view, AffineView):
            x = geometry.affine_bilinear(x, params["matrix"])
            _update(x, params["brightness"] != 1, color.brightness, params["brightness"])
            _update(x, params["contrast"] != 1, color.contrast, params["contrast"])
        return x

    def _normalise(self, x: Tensor, cutout: Tensor | None, out: Tensor) -> None:
        """Write (x / 255 - mean) / std to `out` and set the cutout boxes to zero. Overwrites x."""
        out.copy_(x.mul_(self._scale).add_(self._shift))
        if cutout is not None:
            out.masked_fill_(geometry.box_mask(cutout.to(out.device), out.shape[-1]), 0)


def _update(x: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *args: Tensor) -> None:
    """Apply an operation in place to the chosen images, with the matching rows of the arguments."""
    index = chosen.nonzero().squeeze(1)
    if index.numel() == 0:
        return
    if index.numel() == len(x):
        x.copy_(operation(x, *args))
        return
    x.index_copy_(0, index, operation(x.index_select(0, index), *(a.index_select(0, index) for a in args)))


_JITTER: tuple[tuple[str, float, Callable[[Tensor, Tensor], Tensor]], ...] = (
    ("brightness", 1.0, color.brightness),
    ("contrast", 1.0, color.contrast),
    ("saturation", 1.0, color.saturation),
    ("hue", 0.0, color.hue),
)


def _jitter(x: Tensor, params: Params) -> None:
    """Apply the colour jitter in the order of each image, then grayscale, in place."""
    order = params["order"]
    for position in range(4):
        for index, (name, neutral, operation) in enumerate(_JITTER):
            value = params[name]
            _update(x, (order[:, position] == index) & (value != neutral), operation, value)
    _update(x, params["grayscale"], color.grayscale)


def _strong_operation(x: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Apply one operation of the strong view to each image. The 14 operations fall into four groups."""
    side = x.shape[-1]

    def chosen(*names: str) -> Tensor:
        return sum((operation == STRONG_INDEX[name] for name in names), torch.zeros_like(operation, dtype=torch.bool))

    def pointwise(images: Tensor, kind: Tensor, amount: Tensor) -> Tensor:
        return color.apply_tables(images, color.tables(images, kind, amount, STRONG_INDEX))

    def geometric(images: Tensor, kind: Tensor, amount: Tensor) -> Tensor:
        return geometry.affine_nearest(images, geometry.matrices(kind, amount, side, STRONG_INDEX))

    _update(x, chosen(*_POINTWISE), pointwise, operation, magnitude)
    _update(x, chosen(*_GEOMETRIC), geometric, operation, magnitude)
    _update(x, chosen("color"), color.saturation, magnitude)
    _update(x, chosen("sharpness"), color.sharpness, magnitude)
    return x
