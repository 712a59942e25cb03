"""View specifications, and the random parameters of views. A view is one augmented version of an image.

A view specification (:class:`SimCLRView`, :class:`StrongView`, :class:`PlainView`, :class:`AffineView`) states how
views are drawn. Its :meth:`sample` draws the parameters of one view per image, as CPU tensors with one row per image.
Every renderer uses the same rows, so their images can be compared. The keys:

======================  ========================  ================================================================
key                     shape, dtype              meaning
======================  ========================  ================================================================
top, left,              (n,) int64                crop box in source pixels, resized to (size, size); every view
height, width
flip                    (n,) bool                 mirror left-right, after the crop; every view
brightness, contrast    (n,) float32              blend factors; 1 means no change; simclr, affine
saturation              (n,) float32              blend factor; simclr
hue                     (n,) float32              shift as a fraction of the colour circle; 0 means no change;
                                                  simclr
order                   (n, 4) int64              order of 0 brightness, 1 contrast, 2 saturation, 3 hue; simclr
grayscale               (n,) bool                 replace by luma; simclr
operation               (n, operations) int64     index into STRONG_OPERATIONS; strong
magnitude               (n, operations) float32   in the unit of the operation, with sign; strong
matrix                  (n, 6) float32            a, b, c, d, e, f: output point (x, y) shows the input at
                                                  (a x + b y + c, d x + e y + f), in pixels; affine
cutout                  (n, 4) int64              top, left, bottom, right of the box that is set to zero after
                                                  normalisation; strong, affine
======================  ========================  ================================================================
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ..random import Key, uniforms
from ..schema import BARE_KIND, Settings

Params = dict[str, Tensor]
Range = tuple[float, float]
Probability = Annotated[float, Field(ge=0, le=1)]
Strength = Annotated[float, Field(ge=0)]

#: Pixels: of all images, or (n,) int64 of each.
Length = int | Tensor

CROP_TRIES = 10

#: Operations of the strong view with the range of their magnitude, as in the SCAN reference code. Enhancement factors
#: are below 1, so they only weaken. Rotate is in degrees, shear a slope, translate a fraction of the side, solarize a
#: pixel value, posterize a number of bits.
STRONG_OPERATIONS: tuple[tuple[str, float, float], ...] = (
    ("identity", 0.0, 1.0),
    ("autocontrast", 0.0, 1.0),
    ("equalize", 0.0, 1.0),
    ("rotate", -30.0, 30.0),
    ("solarize", 0.0, 256.0),
    ("color", 0.05, 0.95),
    ("contrast", 0.05, 0.95),
    ("brightness", 0.05, 0.95),
    ("sharpness", 0.05, 0.95),
    ("shear_x", -0.1, 0.1),
    ("translate_x", -0.1, 0.1),
    ("translate_y", -0.1, 0.1),
    ("posterize", 4.0, 8.0),
    ("shear_y", -0.1, 0.1),
)
STRONG_INDEX = {name: index for index, (name, _, _) in enumerate(STRONG_OPERATIONS)}
_SIGNED = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")

#: The 24 orders of four colour operations.
_ORDERS = torch.cartesian_prod(*(torch.arange(4),) * 4)
_ORDERS = _ORDERS[_ORDERS.sort(dim=1).values.eq(torch.arange(4)).all(dim=1)]


def _check_range(name: str, value: Range, low: float) -> None:
    if not (low < value[0] <= value[1] and math.isfinite(value[1])):
        raise ValueError(f"{name} must be (low, high) with {low:g} < low <= high, got {value}")


class _View(Settings):
    """Base of the views.

    Attributes:
        size: side of the square image in pixels; None: that of the source.
    """

    size: int | None = Field(default=None, ge=1)

    def resolved(self, size: int) -> Self:
        """Return this specification with `size` filled in if it is None."""
        return self if self.size is not None else self.model_copy(update={"size": size})

    @property
    def side(self) -> int:
        """Side of the view in pixels.

        Raises:
            ValueError: if `size` is None.
        """
        if self.size is None:
            raise ValueError("view.size is None: call view.resolved(source.size) first")
        return self.size


def _integers(uniform: Tensor, high: Tensor | int) -> Tensor:
    """Scale uniforms to integers in [0, high)."""
    high = torch.as_tensor(high)
    return torch.minimum((uniform.double() * high).to(torch.int64), high - 1)


def _columns(n: int, height: Length, width: Length) -> tuple[Tensor, Tensor]:
    """Return heights and widths as (n,) int64."""
    return torch.as_tensor(height).expand(n), torch.as_tensor(width).expand(n)


def _centre_box(n: int, side: int, height: Length, width: Length) -> Params:
    """Return the centred crop of `side` pixels, or the largest centred square if the image is smaller."""
    height, width = _columns(n, height, width)
    edge = torch.minimum(height, width).clamp(max=side)
    return {
        "top": _half(height - edge),
        "left": _half(width - edge),
        "height": edge.clone(),
        "width": edge.clone(),
    }


def _half(room: Tensor) -> Tensor:
    """Return half of each number, halves to the even neighbour, as torchvision's CenterCrop places its crop."""
    down = room // 2
    return down + (room % 2) * (down % 2)


def _cutout_box(uniform: Tensor, length: int, side: int) -> Tensor:
    """Return (n, 4) boxes with a uniform centre and a half side uniform(1..length) // 2, clipped at the borders."""
    half = (_integers(uniform[:, 0], max(length, 1)) + 1) // 2
    if length == 0:
        half = torch.zeros_like(half)
    centre = _integers(uniform[:, 1:3], side)
    return torch.cat((centre - half.unsqueeze(1), centre + half.unsqueeze(1)), dim=1).clamp_(0, side)


def _factor(uniform: Tensor, strength: float) -> Tensor:
    """Return blend factors, uniform in [max(0, 1 - strength), 1 + strength]."""
    low = max(0.0, 1.0 - strength)
    return low + uniform * (1.0 + strength - low)


class SimCLRView(_View):
    """SimCLR's view: resized crop, flip, colour jitter in random order, grayscale (Chen et al., ICML 2020, app. A).

    Attributes:
        scale: area of the crop, as a fraction of the image's, uniform.
        ratio: aspect ratio of the crop, log-uniform.
        flip: probability of mirroring left-right.
        brightness, contrast, saturation: blend factors uniform in 1 +- strength, not below 0.
        hue: shift uniform in +-hue, as a fraction of the color circle.
        jitter: probability of the four color operations.
        grayscale: probability of replacing colors by their luma.
    """

    kind: Literal["simclr"] = "simclr"
    scale: Range = (0.2, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    flip: Probability = 0.5
    brightness: Strength = 0.4
    contrast: Strength = 0.4
    saturation: Strength = 0.4
    hue: float = Field(default=0.1, ge=0, le=0.5)
    jitter: Probability = 0.8
    grayscale: Probability = 0.2

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _check_range("scale", self.scale, 0.0)
        _check_range("ratio", self.ratio, 0.0)
        return self

    def sample(self, key: Key, epoch: int, samples: Tensor, view: int, height: Length, width: Length) -> Params:
        """Draw parameters for images of (height, width) pixels; the module's table lists the keys."""
        u = uniforms(key, epoch, samples, view, 2 * CROP_TRIES + 10)
        tries, u = u[:, : 2 * CROP_TRIES], u[:, 2 * CROP_TRIES :]
        height, width = _columns(len(samples), height, width)
        crop_height, crop_width = _crop_sizes(tries, self.scale, self.ratio, height, width)
        found = crop_height > 0
        fallback = _fallback_size(self.ratio, height, width)
        crop_height = torch.where(found, crop_height, fallback[0])
        crop_width = torch.where(found, crop_width, fallback[1])
        room_y, room_x = height - crop_height, width - crop_width
        jitter = u[:, 3] < self.jitter
        return {
            "top": torch.where(found, _integers(u[:, 0], room_y + 1), room_y // 2),
            "left": torch.where(found, _integers(u[:, 1], room_x + 1), room_x // 2),
            "height": crop_height,
            "width": crop_width,
            "flip": u[:, 2] < self.flip,
            "brightness": torch.where(jitter, _factor(u[:, 4], self.brightness), 1.0),
            "contrast": torch.where(jitter, _factor(u[:, 5], self.contrast), 1.0),
            "saturation": torch.where(jitter, _factor(u[:, 6], self.saturation), 1.0),
            "hue": torch.where(jitter, (2 * u[:, 7] - 1) * self.hue, 0.0),
            "order": _ORDERS[_integers(u[:, 8], len(_ORDERS))],
            "grayscale": u[:, 9] < self.grayscale,
        }


def _crop_sizes(uniform: Tensor, scale: Range, ratio: Range, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) heights and widths of the first of ten tries that fits the image; 0 if none does.

    Like torchvision's RandomResizedCrop: the area is uniform in `scale`, the aspect ratio log-uniform in `ratio`.
    """
    u = uniform.double().view(-1, CROP_TRIES, 2)
    height, width = height.unsqueeze(1), width.unsqueeze(1)
    area = height * width * (scale[0] + u[..., 0] * (scale[1] - scale[0]))
    aspect = torch.exp(math.log(ratio[0]) + u[..., 1] * (math.log(ratio[1]) - math.log(ratio[0])))
    w = torch.sqrt(area * aspect).round().to(torch.int64)
    h = torch.sqrt(area / aspect).round().to(torch.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    return h.gather(1, first).squeeze(1) * found, w.gather(1, first).squeeze(1) * found


def _fallback_size(ratio: Range, height: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Return the size of the central crop if no try fits: the whole image, with its aspect clamped to `ratio`."""
    aspect = width.double() / height
    tall, wide = aspect < min(ratio), aspect > max(ratio)
    return (
        torch.where(tall, (width.double() / min(ratio)).round().to(torch.int64), height),
        torch.where(wide, (height.double() * max(ratio)).round().to(torch.int64), width),
    )


class StrongView(_View):
    """SCAN's strong view: flip, crop, `operations` of STRONG_OPERATIONS with replacement, cutout.

    Attributes:
        operations: random operations on each image.
        cutout: longest side in pixels of the box that is cut out, 0 for none.
        flip: probability of mirroring left-right.
    """

    kind: Literal["strong"] = "strong"
    operations: int = Field(default=4, ge=0)
    cutout: int = Field(default=16, ge=0)
    flip: Probability = 0.5

    def sample(self, key: Key, epoch: int, samples: Tensor, view: int, height: Length, width: Length) -> Params:
        """Draw parameters for images of (height, width) pixels; the module's table lists the keys."""
        k = self.operations
        u = uniforms(key, epoch, samples, view, 6 + 3 * k)
        box = _centre_box(len(samples), self.side, height, width)
        box["top"] = _integers(u[:, 0], height - box["height"] + 1)
        box["left"] = _integers(u[:, 1], width - box["width"] + 1)
        operation = _integers(u[:, 6 : 6 + k], len(STRONG_OPERATIONS))
        low, high, signed, whole = _OPERATION_TABLE
        magnitude = low[operation] + u[:, 6 + k : 6 + 2 * k] * (high[operation] - low[operation])
        magnitude = torch.where(whole[operation], magnitude.floor(), magnitude)
        negate = signed[operation] & (u[:, 6 + 2 * k :] < 0.5)
        return {
            **box,
            "flip": u[:, 2] < self.flip,
            "operation": operation,
            "magnitude": torch.where(negate, -magnitude, magnitude),
            "cutout": _cutout_box(u[:, 3:6], self.cutout, self.side),
        }


_OPERATION_TABLE = (
    torch.tensor([low for _, low, _ in STRONG_OPERATIONS]),
    torch.tensor([high for _, _, high in STRONG_OPERATIONS]),
    torch.tensor([name in _SIGNED for name, _, _ in STRONG_OPERATIONS]),
    torch.tensor([name == "posterize" for name, _, _ in STRONG_OPERATIONS]),
)


class PlainView(_View):
    """Unchanged views, centre-cropped to `size` if the image is larger: for weak views and evaluation."""

    kind: Literal["plain"] = "plain"

    def sample(self, key: Key, epoch: int, samples: Tensor, view: int, height: Length, width: Length) -> Params:
        """Return the centre box. Nothing is random."""
        n = len(samples)
        return {**_centre_box(n, self.side, height, width), "flip": torch.zeros(n, dtype=torch.bool)}


class AffineView(_View):
    """Views with small affine changes and mild intensity jitter, for digits and other images that must not be mirrored.

    Attributes:
        degrees: rotation, uniform in +-degrees.
        translate: shift of each axis, uniform in +-translate of the side.
        scale: zoom, log-uniform.
        shear: slope of the x shear, as degrees, uniform in +-shear.
        brightness, contrast: blend factors uniform in 1 +- strength.
        cutout: longest side of the cutout box, 0 for none.
    """

    kind: Literal["affine"] = "affine"
    degrees: float = Field(default=15.0, ge=0, le=180)
    translate: float = Field(default=0.12, ge=0, le=1)
    scale: Range = (0.85, 1.15)
    shear: float = Field(default=12.0, ge=0, lt=90)
    brightness: Strength = 0.3
    contrast: Strength = 0.3
    cutout: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        _check_range("scale", self.scale, 0.0)
        return self

    def sample(self, key: Key, epoch: int, samples: Tensor, view: int, height: Length, width: Length) -> Params:
        """Draw parameters for images of (height, width) pixels; the module's table lists the keys."""
        n = len(samples)
        u = uniforms(key, epoch, samples, view, 10)
        return {
            **_centre_box(n, self.side, height, width),
            "flip": torch.zeros(n, dtype=torch.bool),
            "matrix": self._matrix(u[:, :5].double()),
            "brightness": _factor(u[:, 5], self.brightness),
            "contrast": _factor(u[:, 6], self.contrast),
            "cutout": _cutout_box(u[:, 7:10], self.cutout, self.side),
        }

    def _matrix(self, u: Tensor) -> Tensor:
        """Return (n, 6) maps from output to input: the inverse of shear, zoom, rotation and shift about the centre."""
        centred = 2 * u - 1
        angle = torch.deg2rad(centred[:, 0] * self.degrees)
        slope = torch.tan(torch.deg2rad(centred[:, 1] * self.shear))
        zoom = torch.exp(math.log(self.scale[0]) + u[:, 2] * math.log(self.scale[1] / self.scale[0]))
        shift = centred[:, 3:5] * self.translate * self.side
        cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
        # Undo the rotation and the zoom, then the shear x' = x + slope * y.
        a, b = cos + slope * sin, sin - slope * cos
        d, e = -sin, cos
        centre = self.side / 2
        x, y = centre + shift[:, 0], centre + shift[:, 1]
        return torch.stack((a, b, centre - a * x - b * y, d, e, centre - d * x - e * y), dim=1).float()


View = Annotated[SimCLRView | StrongView | PlainView | AffineView, Field(discriminator="kind"), BARE_KIND]
