"""DALI pipelines of :class:`~scan_fast.views.render_dali.DaliRenderer`; importing this module requires DALI.

There are two kinds of DALI samples. The crop pipeline has one sample per image, because every crop has its own shape.
Each later operation has a pipeline whose sample is a *block*: the images that undergo the operation, as one (n, S, S,
3) "video" whose frames are the images. A DALI operator costs microseconds per sample and per run, whatever the sample
holds, so blocks make small images cheap. Blocks are gathered again for each operation, so an image passes only through
the operations that it needs, without DALI's conditionals, which cost as much again.

The arithmetic follows PIL as far as DALI's operators allow: integer pixel values after every operation, each within one
of PIL's. On the CPU, converting float32 to uint8 is DALI's slowest step (5 ns per value) and a table lookup its fastest
(1 ns). Three techniques make it fast:

- `brightness_contrast` on uint8 is exact up to rounding; a shift by half a unit turns its rounding into truncation.
- Blends are computed in 16-bit fixed point and looked up in a table, which divides, truncates and clips.
- A function of two pixel values is a table of 65,536 entries. The hue needs four: three for PIL's 8-bit hue and the
  chroma (one per pair of channels), and one for the colour of a hue and a chroma.

Named arguments of DALI operators are on the CPU. So on a GPU, a value computed from the pixels (the mean of `contrast`)
is a term of a sum instead of an argument. ``on_device=True`` builds this variant on the CPU too, for the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from nvidia.dali import fn, math, pipeline_def, types

from ..ops.augment import Operation
from .color import hue_angles

#: Number of arguments of an operation: one amount, or the six values of a map.
ARGUMENTS = 6

# DALI rounds and PIL truncates. Slightly less than a half, so that integers stay the same after the shift.
_TRUNCATE = -0.4999 / 255

Values = npt.NDArray[np.int64]


def crop_pipeline(resize: bool, **options: Any) -> Any:
    """Build the pipeline that crops boxes out of images, resizes them if `resize` is set, and mirrors some.

    Inputs: images (H, W, 3) uint8; start, shape (2,) int32 in pixels; size (2,) float32, with a negative width to
    mirror.
    Without `resize`, every box must have the output size.
    """

    @pipeline_def(**options)
    def build() -> Any:
        device = _device(options)
        images = fn.external_source(name="images", device=device, layout="HWC", no_copy=device == "cpu")
        start, shape, size = (fn.external_source(name=name) for name in ("start", "shape", "size"))
        cut = fn.slice(images, start=start, shape=shape, axes=[0, 1])
        if resize:
            return fn.resize(cut, size=size, minibatch_size=options["batch_size"])
        return fn.flip(cut, horizontal=fn.cast(size[1] < 0, dtype=types.INT32))

    return build()


def decode_pipeline(sides: Sequence[int], **options: Any) -> Any:
    """Build the pipeline that decodes boxes of JPEG files in their stored orientation, and resizes parts of them.

    Inputs: encoded (bytes,) uint8, on the CPU; box (4,) int32: top, left, height and width of the part to decode; box0,
    box1, ..., one within it for each of `sides`.
    """

    @pipeline_def(**options)
    def build() -> Any:
        encoded = fn.external_source(name="encoded", no_copy=True)
        box = fn.external_source(name="box")
        image = fn.decoders.image_slice(
            encoded,
            device="cpu" if _device(options) == "cpu" else "mixed",
            start=box[:2],
            shape=box[2:],
            axes=[0, 1],
            output_type=types.RGB,
            adjust_orientation=False,
            # The default of libjpeg.
            jpeg_fancy_upsampling=True,
        )
        views = []
        for i, side in enumerate(sides):
            view_box = fn.external_source(name=f"box{i}")
            part = fn.slice(image, start=view_box[:2], shape=view_box[2:], axes=[0, 1])
            views.append(fn.resize(part, size=[side, side], minibatch_size=options["batch_size"]))
        return tuple(views)

    return build()


def block_pipeline(
    operation: Operation, side: int, largest_factor: float, on_device: bool = False, **options: Any
) -> Any:
    """Build the pipeline that applies an operation to blocks of images.

    Inputs: block (n, S, S, 3) uint8; arguments (n, ARGUMENTS) float32: the amount of each image's operation, or the six
    values of a map.

    Args:
        operation: operation to apply.
        side: S.
        largest_factor: bound on the blend factors of saturation, contrast and sharpness.
        on_device: build the variant for a GPU.
        options: options of DALI's pipeline.
    """
    on_device = on_device or options["device_id"] is not None
    graph = _Graph(side, largest_factor, on_device, _device(options))

    @pipeline_def(**options)
    def build() -> Any:
        device = _device(options)
        x = fn.external_source(name="block", device=device, layout="FHWC", no_copy=device == "cpu")
        arguments = fn.external_source(name="arguments")
        # DALI drops inputs without an output, which then cannot be fed, and not every operation reads the arguments.
        return graph.apply(operation, x, arguments), arguments

    return build()


def _device(options: dict[str, Any]) -> str:
    return "cpu" if options["device_id"] is None else "gpu"


class _Graph:
    """Operations on (n, S, S, 3) uint8 blocks; `row` is the (n, ARGUMENTS) float32 tensor of arguments on the CPU."""

    def __init__(self, side: int, largest_factor: float, on_device: bool, device: str) -> None:
        self.side = side
        self.on_device = on_device
        self.device = device
        # A blend with a factor above 1 leaves 0..255 on both sides. `unit` is the finest fixed point in which 16 bits
        # still hold all results; the products may wrap.
        self.overshoot = 255 * max(0.0, largest_factor - 1)
        self.unit = int(65535 / (255 + 2 * self.overshoot + 1))

    def apply(self, operation: Operation, x: Any, row: Any) -> Any:
        """Apply the operation by calling the method of its name."""
        return getattr(self, operation.name.lower())(x, row)

    def brightness(self, x: Any, row: Any) -> Any:
        return fn.brightness_contrast(
            x, brightness=fn.per_frame(row[:, 0]), contrast_center=0.0, brightness_shift=_TRUNCATE
        )

    def contrast(self, x: Any, row: Any) -> Any:
        mean = math.floor(fn.reductions.mean(_luma(x), axes=[1, 2, 3], keep_dims=True, dtype=types.FLOAT) + 0.5)
        if self.on_device:
            return self._blend(x, fn.cast(mean, dtype=types.UINT8), row[:, 0])
        centre = fn.cast(fn.reshape(mean, shape=[-1]), dtype=types.FLOAT)
        return fn.brightness_contrast(
            x,
            contrast=fn.per_frame(row[:, 0]),
            contrast_center=fn.per_frame(centre),
            brightness_shift=_TRUNCATE,
        )

    def saturation(self, x: Any, row: Any) -> Any:
        return self._blend(x, _gray(x), row[:, 0])

    def grayscale(self, x: Any, row: Any) -> Any:
        return _gray(x)

    def hue(self, x: Any, row: Any) -> Any:
        tables = _hue_tables()
        # Two adjacent channels are the low and the high byte of a 16-bit number.
        rg, gb = (
            fn.reinterpret(x[:, :, :, first : first + 2], dtype=types.UINT16, shape=[-1, self.side, self.side])
            for first in (0, 1)
        )
        low = math.min(_lookup(rg, tables["lower"], types.UINT8), _lookup(gb, tables["lower"], types.UINT8))
        lows = low * _number(257)
        rg, gb = rg - lows, gb - lows
        rb = (rg & _number(255)) + (gb & _number(255 << 8))
        # 256 hue + chroma: the 16-bit sum wraps around the circle.
        colour = _lookup(rg, tables["rg"], types.UINT16) + _lookup(gb, tables["gb"], types.UINT16)
        colour = colour + _lookup(rb, tables["rb"], types.UINT16)
        shift = fn.cast(row[:, 0] * 256.0, dtype=types.UINT16)
        colour = colour + self._per_image(shift, dims=2)
        # Three channels in the bytes of one number. They do not carry, because low + chroma is the highest channel.
        packed = _lookup(colour, tables["colour"], types.INT32)
        packed = packed + _lookup(low, np.arange(256) * 0x010101, types.INT32)
        channels = fn.reinterpret(packed, dtype=types.UINT8, shape=[-1, self.side, self.side, 4], layout="FHWC")
        return fn.slice(channels, start=[0], shape=[3], axes=[3])

    def autocontrast(self, x: Any, row: Any) -> Any:
        low = fn.reductions.min(x, axes=[1, 2], keep_dims=True)
        width = fn.reductions.max(x, axes=[1, 2], keep_dims=True) - low
        # A channel with a single value is unchanged.
        stretched = _lookup(_pair(width, x - low), _autocontrast_table(), types.UINT8)
        return _layout(stretched + low * fn.cast(width == 0, dtype=types.UINT8))

    def solarize(self, x: Any, row: Any) -> Any:
        bright = x >= self._per_image(row[:, 0])
        return _layout(x ^ (bright * types.Constant(255, dtype=types.UINT8)))

    def posterize(self, x: Any, row: Any) -> Any:
        return _layout(x & fn.cast(self._per_image(row[:, 0]), dtype=types.UINT8))

    def sharpness(self, x: Any, row: Any) -> Any:
        if self.side < 3:
            return fn.copy(x)
        kernel = np.full((3, 3), 1 / 13, dtype=np.float32)
        kernel[1, 1] = 5 / 13
        inner = np.zeros((1, self.side, self.side, 1), dtype=np.uint8)
        inner[:, 1:-1, 1:-1] = 255
        smooth = fn.filter(x, self._constant(kernel)) & self._constant(inner)
        return self._blend(x, _layout(smooth | (x & self._constant(255 - inner))), row[:, 0])

    def nearest(self, x: Any, row: Any) -> Any:
        return self._warp(x, row, types.INTERP_NN)

    def bilinear(self, x: Any, row: Any) -> Any:
        return self._warp(x, row, types.INTERP_LINEAR)

    def _warp(self, x: Any, row: Any, interpolation: Any) -> Any:
        matrix = fn.reshape(row, shape=[-1, 2, 3])
        return fn.warp_affine(x, matrix=fn.per_frame(matrix), fill_value=0, interp_type=interpolation)

    def _blend(self, x: Any, degenerate: Any, factor: Any) -> Any:
        """Return trunc(clip(d + f (x - d))), with f in steps of 1 / unit."""
        steps = math.floor(factor * float(self.unit) + 0.5)
        weight = self._per_image(fn.cast(steps, dtype=types.UINT16))
        rest = self._per_image(fn.cast(fn.cast(self.unit - steps, dtype=types.INT32) & 65535, dtype=types.UINT16))
        table = np.clip(np.arange(65536) // self.unit, 0, 255)
        # Entries above the highest result are negative results, wrapped.
        table[int((255 + self.overshoot) * self.unit) + 1 :] = 0
        return _layout(_lookup(x * weight + degenerate * rest, table, types.UINT8))

    def _per_image(self, values: Any, dims: int = 3) -> Any:
        """Reshape (n,) values on the CPU to (n, 1, ..., 1), with `dims` ones, on the device of the pixels."""
        values = fn.reshape(values, shape=[-1] + [1] * dims)
        return values.gpu() if self.device == "gpu" else values

    def _constant(self, values: npt.NDArray[Any]) -> Any:
        return types.Constant(values, device=self.device)


def _luma(x: Any) -> Any:
    return fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)


def _gray(x: Any) -> Any:
    return fn.color_space_conversion(_luma(x), image_type=types.GRAY, output_type=types.RGB)


def _layout(x: Any) -> Any:
    """Restore the layout: arithmetic with operands without a layout drops it."""
    return fn.reshape(x, layout="FHWC")


def _pair(high: Any, low: Any) -> Any:
    """Return 256 * high + low for two uint8."""
    return high * _number(256) + low


def _number(value: int) -> Any:
    return types.Constant(value, dtype=types.UINT16)


def _lookup(x: Any, table: Values, dtype: Any) -> Any:
    keys = np.arange(len(table)).tolist()
    return fn.lookup_table(x, keys=keys, values=table.astype(np.float64).tolist(), dtype=dtype)


@cache
def _autocontrast_table() -> Values:
    """Tabulate trunc(255 x / width), by width and distance x from the lowest value; 0 if the width is 0."""
    width, above = np.arange(256)[:, None], np.arange(256)[None, :]
    scale = 255.0 / np.maximum(width, 1)
    return np.where(width > 0, np.minimum((above * scale).astype(np.int64), 255), 0).reshape(-1)


@cache
def _hue_tables() -> dict[str, Values]:
    """Tabulate PIL's 8-bit hue, and the colours of a hue, by pairs of pixel values.

    A pair is the number first + 256 second. "lower" holds the lower of the two.
    "rg", "gb" and "rb" hold 256 hue + chroma by the distances of two channels from the lowest channel. One of the three
    channels has distance 0 in any colour. Each table covers the colours without its third channel, minus what the other
    tables contribute for them. The 16-bit sum of the three is 256 hue + chroma of the colour.
    "colour" holds the distances of the three channels from the lowest, one per byte, by hue and chroma. PIL truncates
    the saturation to 8 bits, which raises the lowest channel by less than one; the table includes the mean of that.
    """
    first, second = np.meshgrid(np.arange(256), np.arange(256))
    none = np.zeros_like(first)

    def number(r: Values, g: Values, b: Values) -> Values:
        return 256 * _angle(r, g, b) + np.maximum(np.maximum(r, g), b)

    rg = number(first, second, none)
    gb = np.where(second > 0, number(none, first, second) - number(none, first, none), 0)
    # "gb" contributes blue alone for any red; if there is red, "rb" corrects it.
    both = (first > 0) & (second > 0)
    rb = np.where(both, number(first, none, second) - number(none, none, second) - number(first, none, none), 0)

    sixths = 6 * np.arange(256)[:, None]
    # Distance of each channel from the highest, in 255ths of the chroma: a trapezoid of the hue.
    red = 2 * 255 - np.abs(sixths - 3 * 255)
    green, blue = (np.abs(sixths - centre * 255) - 255 for centre in (2, 4))
    chroma = np.arange(256)[None, :]
    colour = np.zeros((256, 256), dtype=np.int64)
    for channel, share in enumerate((red, green, blue)):
        drop = np.floor(np.maximum(chroma - 0.3, 0) * np.clip(share, 0, 255) / 255 + 0.5).astype(np.int64)
        colour += (chroma - drop) << (8 * channel)
    pairs = {"rg": rg % 65536, "gb": gb % 65536, "rb": rb % 65536}
    tables = {"lower": np.minimum(first, second), **pairs, "colour": colour}
    return {name: table.astype(np.int64).reshape(-1) for name, table in tables.items()}


def _angle(r: Values, g: Values, b: Values) -> Values:
    pixels = torch.from_numpy(np.stack((r, g, b)).astype(np.float32))
    return hue_angles(pixels.unsqueeze(0)).squeeze(0).numpy().astype(np.int64)
