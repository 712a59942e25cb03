"""One image file or array becomes a square uint8 RGB array: shorter side resized with antialias, centre crop."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})

_EXIF_ORIENTATION = 0x0112


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


def decode(path: str | Path, size: int) -> np.ndarray:
    """Read one file (the first frame of an animation), upright by its EXIF orientation, as (size, size, 3) uint8.

    Raises:
        OSError, ValueError, SyntaxError: as PIL raises them for an unreadable or broken file.
    """
    with Image.open(path) as image:
        # A JPEG can be decoded at 1/2, 1/4 or 1/8; twice the wanted side leaves the antialiasing enough to work on.
        image.draft("RGB", (2 * size, 2 * size))
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            return square(ImageOps.exif_transpose(image), size)
        return square(image, size)


def shorter_side(path: str | Path) -> int:
    """Return the shorter side in pixels from the file's header alone."""
    with Image.open(path) as image:
        return min(image.size)
