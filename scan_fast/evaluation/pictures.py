"""Comparison of pictures by their pixels: copies in another size or quality, not merely similar photographs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_GRID = 16
SMALLEST = 32
"""Pictures with a shorter side in pixels hold too little to tell copies from similar pictures."""


class Signature:
    """A few numbers of a picture, by which its copies are recognised.

    Args:
        picture: an upright picture in mode RGB.

    Attributes:
        size: width and height in pixels.
        pixels: (16, 16, 3) int16, the picture reduced without regard to its aspect ratio.
        rises: (2, 16, 16) bool, whether the brightness rises from each of 17 columns to the next, and row to row.
        contrast: (2, 16, 16) bool, whether that step is large enough to survive compression.
    """

    __slots__ = ("contrast", "pixels", "rises", "size")

    def __init__(self, picture: Image.Image) -> None:
        self.size = picture.size
        box = Image.Resampling.BOX
        self.pixels = np.asarray(picture.resize((_GRID, _GRID), box), dtype=np.int16)
        grey = picture.convert("L")
        across = np.asarray(grey.resize((_GRID + 1, _GRID), box), dtype=np.int16)
        down = np.asarray(grey.resize((_GRID, _GRID + 1), box), dtype=np.int16)
        steps = np.stack([np.diff(across, axis=1), np.diff(down, axis=0)])
        self.rises = steps > 0
        self.contrast = np.abs(steps) >= 4


def same_picture(a: Signature, b: Signature) -> bool:
    """Return whether two pictures are copies of one another, perhaps in another size or quality.

    They have the same aspect ratio up to rounding, the same colours everywhere on a coarse grid, and brightness that
    rises and falls at the same places.
    """
    if min(*a.size, *b.size) < SMALLEST or not _same_shape(a.size, b.size):
        return False
    difference = np.abs(a.pixels - b.pixels)
    if difference.mean() > 6 or np.percentile(difference, 98) > 24:
        return False
    counted = a.contrast | b.contrast
    n = int(counted.sum())
    # Nothing but even areas: the colours have decided.
    return n < 16 or int((a.rises ^ b.rises)[counted].sum()) <= 0.08 * n


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    # Rounding of the smaller picture's sides changes its ratio by up to half a pixel of each.
    smaller = min(*a, *b)
    ratio = (a[0] * b[1]) / (a[1] * b[0])
    tolerance = 0.01 + 1.5 / smaller
    return abs(np.log(ratio)) <= tolerance


def pixel_digest(picture: Image.Image) -> bytes:
    """Return a digest of the size and the pixels of a picture."""
    import hashlib

    array: NDArray[np.uint8] = np.asarray(picture)
    return hashlib.blake2b(repr(array.shape).encode() + array.tobytes(), digest_size=16).digest()
