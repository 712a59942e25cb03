"""One image file becomes an upright RGB image, and that a centre square resized with antialias."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import cache
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..ops import native
from ..ops.augment import RECIPE_HEADER, augment

with suppress(ImportError):  # iPhones' photographs, where the package is installed
    from pillow_heif import register_heif_opener

    register_heif_opener()

#: A file with another suffix is no image.
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2"),
        *(".png", ".apng", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    }
)

#: The longest side that the native kernel takes.
MAX_SIDE = 16384

_BILINEAR = Image.Resampling.BILINEAR
_EXIF_ORIENTATION = 0x0112

# Threads decode side by side; of files above this many pixels (PIL keeps 4 bytes for each) only one at a time, so that
# a folder of panoramas takes the memory of one.
_LARGE = 1 << 25
_one_large = threading.Lock()


#: Top, left, height and width in pixels.
Box = tuple[int, int, int, int]


class Header(NamedTuple):
    """What is known of a file without its pixels.

    Attributes:
        height, width: in pixels of the upright image.
        orientation: 1 to 8, as EXIF counts them; 1 is upright as stored.
        jpeg: whether it is a JPEG of grey or YCbCr colours, which every JPEG decoder reads alike.
    """

    height: int
    width: int
    orientation: int
    jpeg: bool


def read_header(path: str | Path) -> Header:
    """Read a file's header, and decode a JPEG or PNG whose end is missing, to find out those that were cut off.

    The orientation of a PNG counts only where it stands before the pixels; nothing else shows it without decoding.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken file.
    """
    with Image.open(path) as image:
        header = _header(image)
        end = _ENDS.get(image.format or "", b"")
        # Where _header has loaded the pixels, PIL has let go of the file.
        if end and image.fp is not None and not _ends_with(image.fp, end):
            with _alone(*image.size):
                image.load()
        return header


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
    """Read an image's header; of a PNG more may be known after its pixels have been loaded."""
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
    """Convert any mode to RGB: 16-bit grey is scaled to 8 bits, transparency is laid on black."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # PNG and TIFF files of 16 bits; PIL's own conversion would clip everything above 255 to white.
        grey = np.asarray(image).astype(np.int64)
        return Image.fromarray(np.clip((grey + 128) // 257, 0, 255).astype(np.uint8)).convert("RGB")
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


def cut(image: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Cut boxes out of an image and resize each with antialias, as PIL's ``crop(...).resize(...)``.

    Squares get PIL's very levels. Of some others PIL resizes the height before the width, which rounds differently.

    Args:
        image: (H, W, 3) uint8.
        boxes: (n, 4) int64 top, left, height, width in pixels.
        size: side of the squares that are made.

    Returns:
        (n, size, size, 3) uint8.
    """
    if native.has_kernel("augment", "cpu") and max(*image.shape, size) <= MAX_SIDE:
        recipes = torch.zeros((len(boxes), RECIPE_HEADER), dtype=torch.int32)
        recipes[:, :4] = boxes
        first = torch.zeros(len(boxes), dtype=torch.int64)
        return augment(image.unsqueeze(0), recipes, size, (1.0,) * 3, (0.0,) * 3, torch.uint8, indices=first)
    whole = Image.fromarray(image.numpy())
    parts = [whole.crop((x, y, x + width, y + height)) for y, x, height, width in boxes.tolist()]
    return torch.stack([torch.from_numpy(np.array(part.resize((size, size), _BILINEAR))) for part in parts])


def square(image: Tensor, size: int) -> Tensor:
    """Return the centre square of an (H, W, 3) uint8 image, resized with antialias to (size, size, 3)."""
    height, width = image.shape[:2]
    edge = min(height, width)
    box = torch.tensor([[(height - edge) // 2, (width - edge) // 2, edge, edge]])
    return cut(image, box, size)[0]


def decode(path: str | Path, header: Header | None = None, *, smallest: int | None = None) -> tuple[Header, Tensor]:
    """Read one file (the first frame of an animation), upright by its EXIF orientation.

    Whole JPEG files are decoded by torchvision where their header is simple, all others by PIL: both use libjpeg-turbo
    and give the same levels, but torchvision copies less and keeps no Python lock.

    Args:
        path: the file.
        header: what :func:`read_header` returned for it, to save reading that again.
        smallest: where given, a JPEG is decoded at 1/2, 1/4 or 1/8 as long as both sides stay at least this long.

    Returns:
        The header, which tells the full size, and (H, W, 3) uint8.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken file. That includes
            more than 178,956,970 pixels (twice PIL.Image.MAX_IMAGE_PIXELS), which PIL takes for an attack.
    """
    if header is None or smallest is not None or not header.jpeg:
        with Image.open(path) as image:
            header = _header(image)
            if smallest is not None or not header.jpeg:
                if smallest is not None:
                    image.draft("RGB", (smallest, smallest))  # without effect on anything but a JPEG
                with _alone(*image.size):
                    pixels = torch.from_numpy(np.array(to_rgb(image)))
                    if image.format == "PNG":
                        header = _header(image)
                return header, upright(pixels, header.orientation)
    with _alone(header.width, header.height):
        whole = _whole_jpeg(path)
        if whole is None:
            with Image.open(path) as image:
                whole = torch.from_numpy(np.array(to_rgb(image)))
        return header, upright(whole, header.orientation)


def _alone(width: int, height: int) -> AbstractContextManager[object]:
    return _one_large if width * height > _LARGE else nullcontext()


def _whole_jpeg(path: str | Path) -> Tensor | None:
    """Decode a JPEG file into (H, W, 3) uint8 by torchvision; None where PIL has to.

    For a file that was cut off, libjpeg only makes up what is missing; PIL says so.
    """
    data = np.fromfile(path, dtype=np.uint8)
    operator = _jpeg_operator()
    if operator is None or data[-2:].tobytes() != JPEG_END:
        return None
    try:
        planar: Tensor = operator(torch.from_numpy(data), 3)  # 3 is ImageReadMode.RGB
    except RuntimeError:  # what is wrong, PIL will say
        return None
    return planar.permute(1, 2, 0)


@cache
def _jpeg_operator() -> Callable[[Tensor, int], Tensor] | None:
    """Return torchvision's JPEG decoder, where it has one: its function warns at every call that it will move out."""
    try:
        import torchvision.io  # noqa: F401  (registers the operator)

        operator: Callable[[Tensor, int], Tensor] = torch.ops.image.decode_jpeg.default
    except (ImportError, AttributeError, RuntimeError):
        return None
    return operator


# The axes that an EXIF orientation mirrors, after those from 5 on have transposed the image.
_MIRRORED: dict[int, tuple[int, ...]] = {2: (1,), 3: (0, 1), 4: (0,), 6: (1,), 7: (0, 1), 8: (0,)}


def upright(image: Tensor, orientation: int) -> Tensor:
    """Turn and mirror an (H, W, 3) image on any device as its EXIF orientation asks for."""
    if orientation >= 5:
        image = image.transpose(0, 1)
    axes = _MIRRORED.get(orientation)
    return (image.flip(axes) if axes else image).contiguous()


def stored_box(box: Box, header: Header) -> Box:
    """Return where a box (top, left, height, width) of the upright image lies in the image as it is stored."""
    top, left, height, width = box
    mirrored = _MIRRORED.get(header.orientation, ())
    top = header.height - top - height if 0 in mirrored else top
    left = header.width - left - width if 1 in mirrored else left
    return (left, top, width, height) if header.orientation >= 5 else (top, left, height, width)
