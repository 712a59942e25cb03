"""One image file or array becomes a square uint8 RGB array: centre square, resized with antialias."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

#: A file with another suffix is no image.
IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".jp2"),
        *(".png", ".apng", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".avif", ".heic", ".heif"),
        *(".ppm", ".pgm", ".pbm", ".pnm"),
    }
)

_EXIF_ORIENTATION = 0x0112

# Threads decode side by side; of files above this many pixels (PIL keeps 4 bytes for each) only one at a time, so that
# a folder of panoramas takes the memory of one.
_LARGE = 1 << 25
_one_large = threading.Lock()


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
    """Read a file's header.

    The orientation of a PNG counts only where it stands before the pixels; nothing else shows it without decoding.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken file.
    """
    with Image.open(path) as image:
        known = image.format != "PNG" or not image.info.keys().isdisjoint(("exif", "xmp", "Raw profile type exif"))
        return _header(image, _orientation(image) if known else 1)


def _orientation(image: Image.Image) -> int:
    orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _header(image: Image.Image, orientation: int) -> Header:
    width, height = image.size
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


def square(image: Image.Image, size: int) -> np.ndarray:
    """Return the centre square of an image, resized with antialias to (size, size, 3) uint8."""
    image = to_rgb(image)
    width, height = image.size
    if (width, height) != (size, size):
        edge = min(width, height)
        left, top = (width - edge) // 2, (height - edge) // 2
        box = (left, top, left + edge, top + edge)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    return np.array(image)


def decode(path: str | Path, size: int, *, scaled: bool = False) -> tuple[Header, np.ndarray]:
    """Read one file (the first frame of an animation), upright by its EXIF orientation, as (size, size, 3) uint8.

    Args:
        path: the file.
        size: side of the square.
        scaled: decode a JPEG at 1/2, 1/4 or 1/8, as long as either side stays at least twice the wanted one, before it
            is resized. Large photographs take a fraction of the time; levels differ a little.

    Raises:
        OSError, ValueError, SyntaxError and others: as PIL raises them for an unreadable or broken file. That includes
            more than 178,956,970 pixels (twice PIL.Image.MAX_IMAGE_PIXELS), which PIL takes for an attack.
    """
    with Image.open(path) as image:
        whole = image.size
        if scaled:
            image.draft("RGB", (2 * size, 2 * size))
        width, height = image.size
        with _one_large if width * height > _LARGE else nullcontext():
            orientation = _orientation(image)
            pixels = square(ImageOps.exif_transpose(image) if orientation != 1 else image, size)
        height, width = whole if orientation >= 5 else whole[::-1]
        return _header(image, orientation)._replace(height=height, width=width), pixels
