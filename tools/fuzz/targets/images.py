"""Encoded images: headers, decoding in every way that the package decodes, and folders of them."""

from __future__ import annotations

import os
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from scan_fast.data.decode import Header, cut, decode, decode_small, read_header, resize_whole, square
from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource
from scan_fast.data.formats import IMAGE_SUFFIXES
from scan_fast.data.resize import Interpolation
from scan_fast.errors import DataError, MissingPackageError

from ..mutations import mutate
from ..pictures import TOKENS, pictures
from ..target import Target, WrongResult, write

_NO_REFUSAL = (WrongResult, RecursionError, AssertionError)
_FILTERS: tuple[Interpolation, ...] = ("bilinear", "bicubic")
_LARGE = 1 << 24
"""Pixels above which an image may need more memory than these processes have."""


class Decoding(Target):
    """One image, as bytes."""

    name = "image-decoding"
    share = 100
    permitted = (DataError, MissingPackageError)
    # An image of 40 million pixels takes seconds each time, and is decoded five times.
    seconds = 90
    # Twice what PIL and the arrays behind it take for the largest image that is decoded.
    memory_mib = 3000

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._files = pictures()
        self._names, self._others = list(self._files), list(self._files.values())

    def draw(self, rng: Random) -> Any:
        """Return bytes, and numbers that boxes and sizes are drawn from."""
        data = mutate(rng, self._files[rng.choice(self._names)], self._others, TOKENS)
        return data, rng.randrange(1 << 30)

    def feed(self, given: Any, folder: Path) -> None:
        """Decode the image whole, small and in parts, and compare what each way says about it."""
        data, number = given
        header: Header | None = None
        refused: Exception | None = None
        try:
            header = read_header(data)
        except Exception as error:
            refused = _refusal(error, 0)
        try:
            self._decode(data, header, Random(number))
        except Exception as error:
            pixels = 0 if header is None else header.height * header.width
            raise _refusal(error, pixels) from error
        if refused is not None:
            raise WrongResult(f"read_header refused what decode read: {refused}") from refused

    def _decode(self, data: bytes, header: Header | None, rng: Random) -> None:
        own, pixels = decode(data)
        _check_pixels(pixels, own.height, own.width)
        if header is not None:
            late = own._replace(orientation=1), header._replace(orientation=1)
            turned = (own.height, own.width) == (header.width, header.height)
            if own != header and not (data[:4] == b"\x89PNG" and (turned or late[0] == late[1])):
                raise WrongResult(f"the header is {header}, the decoded image {own}")
            _, again = decode(data, header)
            _check_pixels(again, own.height, own.width)
        scaled, small = decode(data, smallest=rng.choice((1, 4, 100)))
        if scaled != own or small.ndim != 3 or small.shape[2] != 3 or not small.numel():
            raise WrongResult(
                f"decoded at a reduced scale, the header is {scaled} instead of {own}, {tuple(small.shape)}"
            )
        thumbnail = decode_small(data, rng.choice((1, 8, 500)))
        if thumbnail.mode != "RGB" or not min(thumbnail.size):
            raise WrongResult(f"the small image is {thumbnail.mode} of {thumbnail.size}")
        if pixels.numel() > 3 * _LARGE:
            return
        side = rng.choice((1, 5, 16))
        filter = rng.choice(_FILTERS)
        _check_pixels(square(pixels, side, filter), side, side)
        boxes = torch.tensor([_box(rng, own.height, own.width) for _ in range(2)])
        _check_pixels(cut(pixels, boxes, side, filter)[1], side, side)
        height, width = rng.choice((1, 7)), rng.choice((1, 30))
        _check_pixels(resize_whole(pixels, height, width, filter), height, width)


def _refusal(error: Exception, pixels: int) -> DataError:
    """Return the error of an unreadable image, as which every exception of a decoder counts.

    Raises:
        Exception: the error itself if no decoder may raise it.
    """
    unusual = isinstance(error, MemoryError) and pixels < _LARGE
    if isinstance(error, _NO_REFUSAL) or unusual:
        raise error
    return DataError(f"{type(error).__name__}: {error}")


def _check_pixels(pixels: Tensor, height: int, width: int) -> None:
    if tuple(pixels.shape) != (height, width, 3) or pixels.dtype != torch.uint8 or not pixels.numel():
        raise WrongResult(f"expected ({height}, {width}, 3) uint8, got {tuple(pixels.shape)} {pixels.dtype}")


def _box(rng: Random, height: int, width: int) -> list[int]:
    top, left = rng.randrange(height), rng.randrange(width)
    return [top, left, rng.randint(1, height - top), rng.randint(1, width - left)]


class Folder(Target):
    """A few image files, opened as a run opens them."""

    name = "image-folders"
    share = 15
    permitted = (DataError, MissingPackageError)
    memory_mib = 3000

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._files = pictures()
        self._names, self._others = list(self._files), list(self._files.values())
        self._suffixes = sorted(IMAGE_SUFFIXES)

    def draw(self, rng: Random) -> Any:
        """Return files, and how they are opened."""
        files = {}
        for number in range(rng.choice((1, 2, 3))):
            name = rng.choice(self._names)
            data = self._files[name]
            suffix = os.path.splitext(name)[1] if rng.random() < 0.8 else rng.choice(self._suffixes)
            files[f"{number}{suffix}"] = data if rng.random() < 0.3 else mutate(rng, data, self._others, TOKENS)
        settings = {
            "on_error": rng.choice(("raise", "skip", "skip")),
            "resident": rng.random() < 0.5,
            "scaled": rng.random() < 0.3,
            "interpolation": rng.choice(("bilinear", "bicubic")),
        }
        return files, settings, rng.randrange(1 << 30)

    def feed(self, given: Any, folder: Path) -> None:
        """Open the folder, read squares, boxes and thumbnails."""
        files, settings, number = given
        for name, data in files.items():
            write(folder, name, data)
        rng = Random(number)
        source = FileSource(ImagePaths(list(files), folder), None, 8, workers=2, **settings)
        try:
            if len(source) + len(source.skipped) != len(files) or not len(source):
                raise WrongResult(f"of {len(files)} images {len(source)} are read and {len(source.skipped)} left out")
            indices = torch.arange(len(source))
            images = source.read(indices)
            if tuple(images.shape) != (len(source), 8, 8, 3):
                raise WrongResult(f"the images are {tuple(images.shape)}")
            for row in range(len(source)):
                source.original(row, 9)
            boxes = torch.tensor([_box(rng, 8, 8) for _ in range(len(source))])
            source.files.cut(indices, 8, [boxes], [5])
            heights, widths = source.files.whole_sizes(indices, 8)
            sizes = zip(heights.tolist(), widths.tolist(), strict=True)
            whole = torch.tensor([_box(rng, height, width) for height, width in sizes])
            source.files.cut_whole(indices, 8, [whole], [5])
        finally:
            source.files.pool.shutdown()
