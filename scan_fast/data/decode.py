"""Decoding of one image, from bytes or a file, to upright RGB pixels; cutting and resizing with antialias."""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from ..ops import native
from ..ops.augment import RECIPE_HEADER, augment
from .encoded import Encoded
from .formats import plugins, prepare
from .resize import Interpolation

#: Most pixels of an image: twice what PIL warns of. Larger ones are refused as attacks, as PIL does unless it is told
#: otherwise.
MOST_PIXELS = 178_956_970
#: Most bytes of an encoded image: more than one of as many pixels has without compression.
LARGEST_FILE = 2 << 30

#: Longest side that the native kernel accepts.
MAX_SIDE = 16384

_FILTERS: dict[Interpolation, Image.Resampling] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_EXIF_ORIENTATION = 0x0112
_TILE_WIDTH, _TILE_HEIGHT = 322, 323  # tags of TIFF
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # markers of JPEG that state a size

# Threads decode at the same time, but only one decodes an image above this many pixels (4 bytes each in PIL), so that a
# folder of panoramas takes the memory of one.
_LARGE = 1 << 25
_one_large = threading.Lock()


#: Top, left, height and width in pixels.
Box = tuple[int, int, int, int]


class Header(NamedTuple):
    """Facts about an encoded image that need no decoding.

    Attributes:
        height, width: of the upright image, in pixels.
        orientation: EXIF orientation, 1 to 8; 1 is upright as stored.
        jpeg: whether it is a grey or YCbCr JPEG, for which all JPEG decoders agree on the colors.
    """

    height: int
    width: int
    orientation: int
    jpeg: bool


def read_header(encoded: Encoded | Path) -> Header:
    """Read the header, and decode a JPEG or PNG whose end is missing, to raise the error of one that was cut off.

    The orientation of a PNG counts only if it is stored before the pixels; finding it behind them needs decoding.

    Args:
        encoded: bytes of an image, or the path of its file.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken image.
    """
    with open_image(encoded) as image:
        header = _header(image)
        end = _ENDS.get(image.format or "", b"")
        # PIL has closed the file if _header has loaded the pixels.
        if end and image.fp is not None and not _ends_with(image.fp, end):
            with _alone(*image.size):
                image.load()
        return header


def open_image(encoded: Encoded | Path) -> ImageFile.ImageFile:
    """Open an image of one of the known formats and read its header.

    Args:
        encoded: bytes of an image, or the path of its file.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken image. That includes
            one of more than :data:`MOST_PIXELS`, and a file of more than :data:`LARGEST_FILE` bytes.
    """
    _check_bytes(encoded)
    image = _opened(encoded)
    width, height = image.size
    if image.format == "TIFF" and isinstance(image, TiffImagePlugin.TiffImageFile):
        # PIL maps uncompressed files that it knows by name into memory, as if those with an orientation were upright
        # there already, and then turns what it has mixed up.
        image.filename = ""
        # A tile is decoded whole, however little of it is in the image.
        tile = [image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_HEIGHT)]
        width, height = (max(side, edge) for side, edge in zip((width, height), tile, strict=True))
    if width * height > MOST_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"it has {width} x {height} pixels, more than {MOST_PIXELS:,} in all")
    return image


def _check_bytes(encoded: Encoded | Path) -> None:
    size = len(encoded) if isinstance(encoded, bytes) else os.stat(encoded).st_size
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, and an image at most {LARGEST_FILE:,}")


def _opened(encoded: Encoded | Path) -> ImageFile.ImageFile:
    try:
        return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=plugins())
    except UnidentifiedImageError:
        # PIL learns some formats from other packages, which are imported when the first such image is met.
        if isinstance(encoded, bytes):
            start = encoded[:32]
        else:
            with open(encoded, "rb") as file:
                start = file.read(32)
        if not prepare(start):
            raise
        return Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=plugins())


JPEG_END = b"\xff\xd9"
_ENDS = {"JPEG": JPEG_END, "MPO": JPEG_END, "PNG": b"\0\0\0\0IEND\xaeB`\x82"}


def _ends_with(file: IO[bytes], end: bytes) -> bool:
    position = file.tell()
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - len(end)))
    found = file.read() == end
    file.seek(position)
    return found


def _header(image: Image.Image) -> Header:
    """Read the header of an image; a PNG may reveal its orientation only after its pixels have been loaded."""
    width, height = image.size
    orientation = 1
    # PIL would load a PNG to look for what comes after its pixels, and turns a TIFF upright by itself.
    loads = image.format == "PNG" and image.info.keys().isdisjoint(("exif", "xmp", "Raw profile type exif"))
    if image.format != "TIFF" and not loads:
        orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
        orientation = orientation if orientation in range(1, 9) else 1
    if orientation >= 5:
        width, height = height, width
    return Header(height, width, orientation, image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: scale 16-bit grey to 8 bits, composite transparency on black."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PNG and TIFF files of 16 bits; PIL's own conversion would clip everything above 255 to white.
        grey = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        grey32 = np.nan_to_num(np.asarray(image, dtype=np.float32))
        scale = 255.0 if grey32.size and grey32.max() <= 1.0 else 1.0
        return Image.fromarray(np.clip(np.rint(grey32 * scale), 0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGB", image.size)
        black.paste(rgba, mask=rgba.getchannel("A"))
        return black
    return image.convert("RGB")


def cut(image: Tensor, boxes: Tensor, size: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Cut boxes out of an image and resize each with antialias, as PIL's ``crop(...).resize(...)``.

    Square boxes give exactly PIL's pixel values. For some others PIL resizes the height first and rounds differently.

    Args:
        image: (H, W, 3) uint8.
        boxes: (n, 4) int64 top, left, height, width in pixels.
        size: side of the resulting squares, in pixels.
        interpolation: the filter of the resize.

    Returns:
        (n, size, size, 3) uint8.
    """
    # The kernel has the bilinear filter only.
    if interpolation == "bilinear" and native.has_kernel("augment", "cpu") and max(*image.shape, size) <= MAX_SIDE:
        recipes = torch.zeros((len(boxes), RECIPE_HEADER), dtype=torch.int32)
        recipes[:, :4] = boxes
        first = torch.zeros(len(boxes), dtype=torch.int64)
        return augment(image.unsqueeze(0), recipes, size, (1.0,) * 3, (0.0,) * 3, torch.uint8, indices=first)
    whole, chosen = Image.fromarray(image.numpy()), _FILTERS[interpolation]
    parts = [whole.crop((x, y, x + width, y + height)) for y, x, height, width in boxes.tolist()]
    return torch.stack([torch.from_numpy(np.array(part.resize((size, size), chosen))) for part in parts])


def square(image: Tensor, size: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Return the centre square of an (H, W, 3) uint8 image, resized with antialias to (size, size, 3)."""
    height, width = image.shape[:2]
    edge = min(height, width)
    box = torch.tensor([[(height - edge) // 2, (width - edge) // 2, edge, edge]])
    return cut(image, box, size, interpolation)[0]


def resize_whole(image: Tensor, height: int, width: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Resize an (H, W, 3) uint8 image with antialias to (height, width, 3), with PIL's pixel values.

    An image that lies on its side compared with the wanted size is turned: a PNG may tell only after its pixels that it
    is not upright.
    """
    if (image.shape[0] - image.shape[1]) * (height - width) < 0:
        image = image.transpose(0, 1).contiguous()
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image.numpy()).resize((width, height), _FILTERS[interpolation])
    return torch.from_numpy(np.array(resized))


def decode(
    encoded: Encoded | Path, header: Header | None = None, *, smallest: int | None = None
) -> tuple[Header, Tensor]:
    """Decode one image (the first frame of an animation), upright by its EXIF orientation.

    torchvision decodes whole grey and YCbCr JPEGs, PIL everything else. Both use libjpeg-turbo and give the same pixel
    values, but torchvision copies less and releases Python's global lock.

    Args:
        encoded: bytes of an image, or the path of its file.
        header: result of :func:`read_header` for the image, to save reading it again.
        smallest: if given, decode a JPEG at 1/2, 1/4 or 1/8 as long as both sides stay at least this long.

    Returns:
        The header, with the full size, and (H, W, 3) uint8.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken image. That includes
            more than 178,956,970 pixels (twice PIL.Image.MAX_IMAGE_PIXELS), which PIL refuses as an attack.
    """
    if header is None or smallest is not None or not header.jpeg:
        with open_image(encoded) as image:
            header = _header(image)
            if smallest is not None or not header.jpeg:
                if smallest is not None and image.format in ("JPEG", "MPO"):
                    image.draft("RGB", (smallest, smallest))
                with _alone(*image.size):
                    pixels = torch.from_numpy(np.array(to_rgb(image)))
                    if image.format == "PNG":
                        header = _header(image)
                decoded = upright(pixels, header.orientation)
                # A HEIC may state one size in its header and hold an image of another.
                if smallest is None and decoded.shape[:2] != (header.height, header.width):
                    raise ValueError(
                        f"its header states {header.width} x {header.height} pixels, "
                        f"it holds {decoded.shape[1]} x {decoded.shape[0]}"
                    )
                return header, decoded
    with _alone(header.width, header.height):
        whole = _whole_jpeg(encoded)
        if whole is None:
            with open_image(encoded) as image:
                whole = torch.from_numpy(np.array(to_rgb(image)))
        return header, upright(whole, header.orientation)


def decode_small(encoded: Encoded | Path, side: int) -> Image.Image:
    """Decode one whole image, upright, no larger than needed to show it.

    Args:
        encoded: bytes of an image, or the path of its file.
        side: largest length of the longer side in pixels. Smaller images keep their size.

    Returns:
        The image in mode RGB, in its own aspect ratio.

    Raises:
        OSError, ValueError, SyntaxError and others: as :func:`decode`.
    """
    with open_image(encoded) as image:
        header = _header(image)
        # The reduced scale of a JPEG leaves twice the wanted pixels, enough to antialias. A HEIC file may hold a
        # preview of that size. Other formats ignore it.
        image.draft("RGB", _within(image.size, 2 * side))
        with _alone(*image.size):
            image.load()
            rgb = to_rgb(image)
            if image.format == "PNG":
                header = _header(image)
        small = (
            rgb if max(rgb.size) <= side else rgb.resize(_within(rgb.size, side), _FILTERS["bicubic"], reducing_gap=2.0)
        )
    transpose = _TRANSPOSES.get(header.orientation)
    return small.copy() if transpose is None else small.transpose(transpose)


def _within(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the size in the same aspect ratio whose longer side is `side`; no side is below one pixel."""
    longer = max(size)
    return max(1, round(size[0] * side / longer)), max(1, round(size[1] * side / longer))


def to_array(encoded: Encoded | Path) -> np.ndarray:
    """Return the bytes of an encoded image, or of the file with this path, as (bytes,) uint8."""
    if isinstance(encoded, bytes):
        return np.frombuffer(bytearray(encoded), dtype=np.uint8)  # a copy, as tensors need writable memory
    return np.fromfile(encoded, dtype=np.uint8)


def _alone(width: int, height: int) -> AbstractContextManager[object]:
    return _one_large if width * height > _LARGE else nullcontext()


def _whole_jpeg(encoded: Encoded | Path) -> Tensor | None:
    """Decode a JPEG into (H, W, 3) uint8 with torchvision; return None if PIL has to.

    libjpeg invents the missing part of an image that was cut off; PIL raises an error.
    """
    _check_bytes(encoded)
    data = to_array(encoded)
    operator = _jpeg_operator()
    # A header that was noted earlier may be of another image.
    if operator is None or not 0 < _jpeg_pixels(data) <= MOST_PIXELS or data[-2:].tobytes() != JPEG_END:
        return None
    try:
        planar: Tensor = operator(torch.from_numpy(data), 3)  # 3 is ImageReadMode.RGB
    except RuntimeError:  # PIL reports the cause
        return None
    return planar.permute(1, 2, 0)


def _jpeg_pixels(data: np.ndarray) -> int:
    """Return the number of pixels that a JPEG states, 0 if it does not say so in its first segments."""
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = int(data[at + 1])
        if marker in _FRAMES:
            height, width = (int(data[p]) * 256 + int(data[p + 1]) for p in (at + 5, at + 7))
            return height * width
        plain = marker == 0xFF or marker == 0x01 or 0xD0 <= marker <= 0xD9
        at += (1 if marker == 0xFF else 2) if plain else 2 + int(data[at + 2]) * 256 + int(data[at + 3])
    return 0


@cache
def _jpeg_operator() -> Callable[[Tensor, int], Tensor] | None:
    """Return torchvision's JPEG operator, or None if it has none; the public function warns of its removal."""
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        operator: Callable[[Tensor, int], Tensor] = torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None
    return operator


_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Axes that an EXIF orientation mirrors, after orientations 5 to 8 have transposed the image.
_MIRRORED: dict[int, tuple[int, ...]] = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}


def upright(image: Tensor, orientation: int) -> Tensor:
    """Rotate and mirror an (H, W, 3) image on any device by its EXIF orientation."""
    if orientation >= 5:
        image = image.transpose(0, 1)
    axes = _MIRRORED.get(orientation)
    return (image.flip(axes) if axes else image).contiguous()


def stored_box(box: Box, header: Header) -> Box:
    """Map a box (top, left, height, width) of the upright image to the image as stored."""
    top, left, height, width = box
    mirrored = _MIRRORED.get(header.orientation, ())
    top = header.height - top - height if 0 in mirrored else top
    left = header.width - left - width if 1 in mirrored else left
    return (left, top, width, height) if header.orientation >= 5 else (top, left, height, width)
