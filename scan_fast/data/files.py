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

from .decode import Header, decode, read_header, square
from .errors import DataError
from .sources import check_annotations, take_rows

_SKIP_ADVICE = "Remove or repair the file, or set data.on_error=skip to leave unreadable images out."


class ImageFiles:
    """The files behind a source, in its numbering: for a renderer that decodes them itself.

    Attributes:
        root: the folder that the names are relative to, or "".
        names: the name of each file.
        heights, widths: (N,) int32 pixels of the upright images.
        orientations: (N,) uint8, 1 to 8 as EXIF counts them; 1 is upright as stored.
        jpeg: (N,) bool, whether a file is a JPEG in grey or YCbCr colours. The others need :func:`.decode.decode`.
    """

    def __init__(self, root: str, names: list[str]) -> None:
        self.root = root
        self.names = names
        self.heights = torch.zeros(len(names), dtype=torch.int32)
        self.widths = torch.zeros(len(names), dtype=torch.int32)
        self.orientations = torch.ones(len(names), dtype=torch.uint8)
        self.jpeg = torch.zeros(len(names), dtype=torch.bool)
        # The same memory, which NumPy writes single entries of much faster.
        self._columns = tuple(x.numpy() for x in (self.heights, self.widths, self.orientations, self.jpeg))

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Return where a file is."""
        return os.path.join(self.root, self.names[index])

    def take(self, indices: Tensor) -> ImageFiles:
        """Return some of the files, (n,) int64."""
        some = ImageFiles(self.root, [self.names[i] for i in indices.tolist()])
        for column, own in zip(some._columns, self._columns, strict=True):
            column[:] = own[indices.numpy()]
        return some

    def encoded(self, indices: Tensor) -> list[np.ndarray]:
        """Return the bytes of the files (n,) int64, each (bytes,) uint8.

        Raises:
            DataError: for a file that can no longer be read.
        """
        return [self._bytes(i) for i in indices.tolist()]

    def squares(self, indices: Tensor) -> Tensor:
        """Return (n, 3) int64: top, left and side, in upright pixels, of the centre squares that `read` reduces.

        A pixel (y, x) of the image of `size` pixels lies at (top, left) + (y, x) * side / size.
        """
        heights, widths = self.heights[indices].long(), self.widths[indices].long()
        side = torch.minimum(heights, widths)
        return torch.stack(((heights - side) // 2, (widths - side) // 2, side), dim=1)

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
    """Images in files, decoded with PIL in a thread pool; a :class:`.sources.Source`.

    A resident source decodes every file here and keeps the images. Of another one every file's header is read here and
    the pixels at each use; with ``on_error="skip"`` every file is decoded here in any case, because an image that fails
    in mid-training can no longer be left out without renumbering the others.

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
    ) -> None:
        if not files:
            raise DataError("files must name at least one image, got none")
        if problems and on_error == "raise":
            raise unreadable(os.path.join(root, problems[0][0]), problems[0][1])
        self.files: ImageFiles = ImageFiles(os.fspath(root), [os.fspath(file) for file in files])
        check_annotations(len(files), labels, self.files.names)
        self.size = size
        self.class_names = None if class_names is None else list(class_names)
        self.skipped: list[tuple[str, str]] = list(problems)
        self.resident = resident
        self.images = torch.empty((len(files), size, size, 3), dtype=torch.uint8) if resident else None
        # Twice the wanted side leaves the antialiasing enough to work on.
        self._smallest = 2 * size if scaled else None
        self._workers = workers or min(16, os.cpu_count() or 1)
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")

        kept = self._check_all(on_error, decode_all=resident or on_error == "skip")
        if len(kept) < len(self.files):
            keep = torch.tensor(kept, dtype=torch.int64)
            self.files = self.files.take(keep)
            labels = None if labels is None else labels[keep]
            self.images = None if self.images is None else self.images[keep]
        self.paths = self.files.names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def _check_all(self, on_error: str, *, decode_all: bool) -> list[int]:
        """Decode every file, or only read its header; return the numbers of the good ones."""
        images = None if self.images is None else self.images.numpy()

        def check(i: int) -> str | None:
            path = self.files.path(i)
            try:
                if decode_all:
                    header, image = decode(path, smallest=self._smallest)
                    if images is not None:
                        images[i] = square(image, self.size).numpy()
                else:
                    header = read_header(path)
            except Exception as error:  # PIL's plugins raise OSError, ValueError, SyntaxError, struct.error and more
                return _reason(error, path)
            self.files.note(i, header)
            return None

        kept = []
        step = 256 * self._workers  # so that a failure is noticed soon
        for start in range(0, len(self.files), step):
            numbers = range(start, min(start + step, len(self.files)))
            for i, reason in zip(numbers, list(self._pool.map(check, numbers)), strict=True):
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
        batch = torch.empty((len(indices), self.size, self.size, 3), dtype=torch.uint8)
        pixels = batch.numpy()
        numbers = indices.tolist()

        def fill(rows: range) -> None:
            for row in rows:
                path = self.files.path(numbers[row])
                try:
                    header = self.files.header(numbers[row])
                    pixels[row] = square(decode(path, header, smallest=self._smallest)[1], self.size).numpy()
                except Exception as error:
                    raise unreadable(path, _reason(error, path)) from error

        # Several images to a task, as small ones take no longer than a task's own overhead.
        step = max(1, len(numbers) // (8 * self._workers))
        parts = [range(start, min(start + step, len(numbers))) for start in range(0, len(numbers), step)]
        for future in [self._pool.submit(fill, rows) for rows in parts]:
            future.result()
        return batch

    def keep_on(self, device: torch.device) -> None:
        """Move the images, where they are kept, to a device."""
        if self.images is not None:
            self.images = self.images.to(device)


def unreadable(path: str, reason: str) -> DataError:
    """Return the error that names an unreadable file and what may be done."""
    return DataError(f"cannot read image {path}: {reason}. {_SKIP_ADVICE}")


def _reason(error: Exception, path: str) -> str:
    advice = ""
    if isinstance(error, UnidentifiedImageError) and path.lower().endswith((".heic", ".heif")):
        advice = "; files of this kind need the package pillow-heif"
    return f"{type(error).__name__}: {error}{advice}"
