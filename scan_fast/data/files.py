"""Images in files: what is known of each, the encoded bytes, and the source that decodes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor

from ..errors import DataError
from .decode import Box, Header, cut, decode, read_header, square
from .decode_cache import DecodeCache
from .sources import check_annotations, take_rows

_SKIP_ADVICE = "Remove or repair the file, or set data.on_error=skip to leave unreadable images out."


class ImageFiles:
    """The files behind a source, in its numbering: decoded by a pool of threads, or as they are for a renderer.

    Attributes:
        root: the folder that the names are relative to, or "".
        names: the name of each file.
        workers: decoding threads; by default one per core, at most 16.
        scaled: decode large JPEG files at a reduced scale, see ``data.decode``.
        heights, widths: (N,) int32 pixels of the upright images.
        orientations: (N,) uint8, 1 to 8 as EXIF counts them; 1 is upright as stored.
        jpeg: (N,) bool, whether a file is a JPEG in grey or YCbCr colours. The others need :func:`.decode.decode`.
    """

    def __init__(self, root: str, names: list[str], workers: int | None = None, *, scaled: bool = False) -> None:
        self.root = root
        self.names = names
        self.workers = workers or min(16, _cores())
        self.scaled = scaled
        self.heights = torch.zeros(len(names), dtype=torch.int32)
        self.widths = torch.zeros(len(names), dtype=torch.int32)
        self.orientations = torch.ones(len(names), dtype=torch.uint8)
        self.jpeg = torch.zeros(len(names), dtype=torch.bool)
        # The same memory, which NumPy writes single entries of much faster.
        self._columns = tuple(x.numpy() for x in (self.heights, self.widths, self.orientations, self.jpeg))
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Return where a file is."""
        return os.path.join(self.root, self.names[index])

    def take(self, indices: Tensor) -> ImageFiles:
        """Return some of the files, (n,) int64."""
        some = ImageFiles(self.root, [self.names[i] for i in indices.tolist()], self.workers, scaled=self.scaled)
        some.pool = self.pool
        for column, own in zip(some._columns, self._columns, strict=True):
            column[:] = own[indices.numpy()]
        return some

    def encoded(self, indices: Tensor) -> list[np.ndarray]:
        """Return the bytes of the files (n,) int64, each (bytes,) uint8.

        Raises:
            DataError: for a file that can no longer be read.
        """
        return list(self.pool.map(self._bytes, indices.tolist()))

    def squares(self, indices: Tensor) -> Tensor:
        """Return (n, 3) int64: top, left and side, in upright pixels, of the centre squares that a source reduces.

        A point (y, x) of the reduced image of `size` pixels lies at (top, left) + (y, x) * side / size.
        """
        heights, widths = self.heights[indices].long(), self.widths[indices].long()
        side = torch.minimum(heights, widths)
        return torch.stack(((heights - side) // 2, (widths - side) // 2, side), dim=1)

    def cut(self, indices: Tensor, frame: int, boxes: Sequence[Tensor], sides: Sequence[int]) -> list[Tensor]:
        """Cut boxes out of the centre squares of files, each file decoded once, and resize them with antialias.

        Args:
            indices: (n,) int64.
            frame: the number of units into which a centre square's side is divided.
            boxes: several times (n, 4) int64 top, left, height, width in these units; rounded to whole pixels.
            sides: the side in pixels of what is made of each.

        Returns:
            Several times (n, side, side, 3) uint8.

        Raises:
            DataError: for a file that can no longer be read.
        """
        out = [torch.empty((len(indices), side, side, 3), dtype=torch.uint8) for side in sides]
        numbers = indices.tolist()
        corners = [several.tolist() for several in boxes]

        def fill(rows: range) -> None:
            for row in rows:
                wanted = [several[row] for several in corners]
                path = self.path(numbers[row])
                try:
                    image = self._decode(numbers[row], frame, wanted, sides)
                    for part, box, side in zip(out, wanted, sides, strict=True):
                        pixels = in_pixels(box, frame, *image.shape[:2])
                        part[row] = cut(image, torch.tensor([pixels]), side)[0]
                except Exception as error:
                    raise unreadable(path, _reason(error, path)) from error

        # Several files to a task, as small ones take no longer than a task's own overhead.
        step = max(1, len(numbers) // (8 * self.workers))
        parts = [range(start, min(start + step, len(numbers))) for start in range(0, len(numbers), step)]
        for future in [self.pool.submit(fill, rows) for rows in parts]:
            future.result()
        return out

    def _decode(self, index: int, frame: int, boxes: Sequence[Sequence[int]], sides: Sequence[int]) -> Tensor:
        smallest = None
        if self.scaled:
            # Twice the wanted side leaves the antialiasing of every box enough to work on.
            smallest = max(-(-2 * side * frame // min(box[2:])) for box, side in zip(boxes, sides, strict=True))
        return decode(self.path(index), self.header(index), smallest=smallest)[1]

    def note(self, index: int, header: Header) -> None:
        """Keep what the header of a file says."""
        for column, value in zip(self._columns, header, strict=True):
            column[index] = value

    def header(self, index: int) -> Header:
        """Return what is known of a file."""
        height, width, orientation, jpeg = (column[index].item() for column in self._columns)
        return Header(height, width, orientation, jpeg)

    def _bytes(self, index: int) -> np.ndarray:
        try:
            return np.fromfile(self.path(index), dtype=np.uint8)
        except OSError as error:
            raise unreadable(self.path(index), _reason(error, self.path(index))) from error


class FileSource:
    """Images in files, decoded in a thread pool; a :class:`.sources.Source`.

    A resident source decodes every file here and keeps the images. Of another one every file's header and end are read
    here and the pixels at each use; with ``on_error="skip"`` every file is decoded here in any case, because an image
    that fails in mid-training can no longer be left out without renumbering the others.
    Files in `decode_cache` are not decoded again.

    Args:
        files: the image files, relative to `root`.
        labels: (N,) int64 or None.
        size: side of the square images.
        root: the folder of the files; by default they are named as seen from the working directory.
        class_names: name of each class.
        on_error: "raise", or "skip" to list unreadable files in `skipped` and leave them out.
        workers: decoding threads; by default the number of cores, at most 16.
        resident: whether the decoded images are kept: N * size * size * 3 bytes.
        scaled: decode large JPEG files at a reduced scale, see ``data.decode``.
        problems: (path, reason) of what could not even be listed; treated as unreadable files.
        decode_cache: the files that an earlier start has decoded; those that are decoded here are entered.

    Raises:
        DataError: for an unreadable file with ``on_error="raise"``, or where no readable file remains.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        labels: Tensor | None,
        size: int,
        *,
        root: str | Path = "",
        class_names: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        workers: int | None = None,
        resident: bool = True,
        scaled: bool = False,
        problems: Sequence[tuple[str, str]] = (),
        decode_cache: DecodeCache | None = None,
    ) -> None:
        if not files:
            raise DataError("files must name at least one image, got none")
        if problems and on_error == "raise":
            raise unreadable(os.path.join(root, problems[0][0]), problems[0][1])
        names = [os.fspath(file) for file in files]
        self.files: ImageFiles = ImageFiles(os.fspath(root), names, workers, scaled=scaled)
        check_annotations(len(files), labels, self.files.names)
        self.size = size
        self.class_names = None if class_names is None else list(class_names)
        self.skipped: list[tuple[str, str]] = list(problems)
        self.resident = resident
        self.images = torch.empty((len(files), size, size, 3), dtype=torch.uint8) if resident else None

        # The pixels of images that are kept are wanted, whatever is known of their files.
        decode_cache = DecodeCache() if decode_cache is None or resident else decode_cache
        kept = self._check_all(on_error, decode_cache, decode_all=resident or on_error == "skip")
        if len(kept) < len(self.files):
            keep = torch.tensor(kept, dtype=torch.int64)
            self.files = self.files.take(keep)
            labels = None if labels is None else labels[keep]
            self.images = None if self.images is None else self.images[keep]
        self.paths = self.files.names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def _check_all(self, on_error: str, decode_cache: DecodeCache, *, decode_all: bool) -> list[int]:
        """Decode every file, or only read its header; return the numbers of the good ones."""
        images = None if self.images is None else self.images.numpy()
        smallest = 2 * self.size if self.files.scaled else None

        def check(i: int) -> str | None:
            path = self.files.path(i)
            try:
                if not decode_all:
                    header = read_header(path)
                else:
                    status = os.stat(path)
                    known = decode_cache.recall(path, status)
                    if known is None:
                        header, image = decode(path, smallest=smallest)
                        decode_cache.note(path, status, header)
                        if images is not None:
                            images[i] = square(image, self.size).numpy()
                    else:
                        header = known
            except Exception as error:  # PIL's plugins raise OSError, ValueError, SyntaxError, struct.error and more
                return _reason(error, path)
            self.files.note(i, header)
            return None

        kept = []
        step = 256 * self.files.workers  # so that a failure is noticed soon
        for start in range(0, len(self.files), step):
            numbers = range(start, min(start + step, len(self.files)))
            for i, reason in zip(numbers, list(self.files.pool.map(check, numbers)), strict=True):
                if reason is None:
                    kept.append(i)
                elif on_error == "skip":
                    self.skipped.append((self.files.names[i], reason))
                else:
                    raise unreadable(self.files.path(i), reason)
        if not kept:
            raise DataError(f"none of the {len(self.files)} image files could be read; the first: {self.skipped[0]}")
        return kept

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8.

        Raises:
            DataError: for a file that can no longer be read.
        """
        if self.images is not None:
            return take_rows(self.images, indices)
        whole = torch.tensor([0, 0, self.size, self.size]).expand(len(indices), 4)
        return self.files.cut(indices, self.size, [whole], [self.size])[0]

    def keep_on(self, device: torch.device) -> None:
        """Move the images, where they are kept, to a device."""
        if self.images is not None:
            self.images = self.images.to(device)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pixels(box: Sequence[int], frame: int, height: int, width: int) -> Box:
    """Return the whole pixels of a box whose unit is a part of `frame` of the centre square of (height, width)."""
    edge = min(height, width)
    top, left, box_height, box_width = box
    ends = (top, top + box_height, left, left + box_width)
    y, bottom, x, right = ((2 * edge * end + frame) // (2 * frame) for end in ends)
    # Of an image smaller than the frame, a narrow box may round to nothing.
    y, x = min(y, edge - 1), min(x, edge - 1)
    return (height - edge) // 2 + y, (width - edge) // 2 + x, max(1, bottom - y), max(1, right - x)


def unreadable(path: str, reason: str) -> DataError:
    """Return the error that names an unreadable file and what may be done."""
    return DataError(f"cannot read image {path}: {reason}. {_SKIP_ADVICE}")


def _reason(error: Exception, path: str) -> str:
    advice = ""
    if isinstance(error, UnidentifiedImageError) and path.lower().endswith((".heic", ".heif")):
        advice = "; files of this kind need the package pillow-heif"
    return f"{type(error).__name__}: {error}{advice}"
