"""Encoded images and their headers, a pool of threads that decodes them, and the source built on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .. import distributed
from ..errors import DataError
from .agreement import check_same
from .checking import check_all, none_readable, reason_of, unreadable
from .decode import Box, Header, cut, decode, decode_small, resize_whole, to_array
from .decode_cache import DecodeCache
from .encoded import SMALL, Encoded, EncodedImages, Identity, IdentityKind, fingerprint
from .resize import Interpolation
from .sources import check_annotations, take_rows

_UNKNOWN = -1
"""In a stamp that is not known."""


class ImageFiles:
    """Encoded images of a source, in its numbering: decoded by a pool of threads, or as bytes for a renderer.

    Attributes:
        images: the encoded images.
        workers: decoding threads; by default one per core, at most 16.
        scaled: decode large JPEGs at a reduced scale, see ``data.decode``.
        interpolation: the filter that resizes what is cut out, see ``data.interpolation``.
        identity: what tells whether a file is still the same, see ``data.identity``.
        heights, widths: (N,) int32 pixels of the upright images.
        orientations: (N,) uint8 EXIF orientations, 1 to 8; 1 is upright as stored.
        fingerprints: (N,) uint64, see :func:`.encoded.fingerprint`.
        stamps: (N, 4) int64 of the files when they had these fingerprints, see :data:`.encoded.Stamp`; -1 if they are
            not known, or a change since then need not show in them.
        mtimes: (N,) int64 times of the last change that must stay, in nanoseconds, see ``data.identity``; -1 for none.
        jpeg: (N,) bool, True for grey and YCbCr JPEGs. All others need :func:`.decode.decode`.
    """

    def __init__(
        self,
        images: EncodedImages,
        workers: int | None = None,
        *,
        scaled: bool = False,
        interpolation: Interpolation = "bilinear",
        identity: IdentityKind = "content",
    ) -> None:
        self.images = images
        self.workers = workers or min(16, _cores())
        self.scaled = scaled
        self.interpolation: Interpolation = interpolation
        self.identity: IdentityKind = identity
        self.heights = torch.zeros(len(images), dtype=torch.int32)
        self.widths = torch.zeros(len(images), dtype=torch.int32)
        self.orientations = torch.ones(len(images), dtype=torch.uint8)
        self.jpeg = torch.zeros(len(images), dtype=torch.bool)
        # Views of the same memory: NumPy writes single entries much faster.
        self._columns = tuple(x.numpy() for x in (self.heights, self.widths, self.orientations, self.jpeg))
        self.fingerprints = np.zeros(len(images), dtype=np.uint64)
        self.stamps = np.full((len(images), 4), _UNKNOWN)
        self.mtimes = np.full(len(images), _UNKNOWN)
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def names(self) -> list[str]:
        """Name of each image."""
        return self.images.names

    def take(self, indices: Tensor) -> ImageFiles:
        """Return some of the images, (n,) int64."""
        chosen = self.images.select(indices.tolist())
        some = ImageFiles(
            chosen, self.workers, scaled=self.scaled, interpolation=self.interpolation, identity=self.identity
        )
        some.pool = self.pool
        for column, own in zip(some._columns, self._columns, strict=True):
            column[:] = own[indices.numpy()]
        rows = indices.numpy()
        some.fingerprints, some.stamps, some.mtimes = self.fingerprints[rows], self.stamps[rows], self.mtimes[rows]
        return some

    def encoded(self, indices: Tensor) -> list[np.ndarray]:
        """Return the bytes of the images (n,) int64, each (bytes,) uint8.

        Raises:
            DataError: if an image can no longer be read.
        """
        return list(self.pool.map(self._bytes, indices.tolist()))

    def squares(self, indices: Tensor) -> Tensor:
        """Return (n, 3) int64: top, left and side of the centre squares, in pixels of the upright images.

        A point (y, x) of the square resized to `size` pixels is at (top, left) + (y, x) * side / size.
        """
        heights, widths = self.heights[indices].long(), self.widths[indices].long()
        side = torch.minimum(heights, widths)
        return torch.stack(((heights - side) // 2, (widths - side) // 2, side), dim=1)

    def cut(self, indices: Tensor, frame: int, boxes: Sequence[Tensor], sides: Sequence[int]) -> list[Tensor]:
        """Cut boxes out of the centre squares of images, decoding each image once, and resize them with antialias.

        Args:
            indices: (n,) int64.
            frame: number of units per side of a centre square.
            boxes: for each view, (n, 4) int64 top, left, height, width in these units; rounded to whole pixels.
            sides: for each view, the side of its result in pixels.

        Returns:
            For each view, (n, side, side, 3) uint8.

        Raises:
            DataError: if an image can no longer be read.
        """

        def parts(index: int, wanted: list[list[int]]) -> Iterator[Tensor]:
            image = self._decode(index, frame, wanted, sides)
            for box, side in zip(wanted, sides, strict=True):
                pixels = in_pixels(box, frame, *image.shape[:2])
                yield cut(image, torch.tensor([pixels]), side, self.interpolation)[0]

        return self._fill(indices, boxes, sides, parts)

    def whole_sizes(self, indices: Tensor, shorter: int) -> tuple[Tensor, Tensor]:
        """Return the (n,) int64 heights and widths of whole images whose shorter side is resized to `shorter` pixels.

        The longer side is rounded down, as torchvision's Resize does.
        """
        heights, widths = self.heights[indices].long(), self.widths[indices].long()
        smaller = torch.minimum(heights, widths)
        return shorter * heights // smaller, shorter * widths // smaller

    def cut_whole(self, indices: Tensor, shorter: int, boxes: Sequence[Tensor], sides: Sequence[int]) -> list[Tensor]:
        """Resize whole images, each decoded once, then cut boxes out of them and resize these, with antialias.

        Args:
            indices: (n,) int64.
            shorter: length in pixels to which the shorter side of an image is resized.
            boxes: for each view, (n, 4) int64 top, left, height, width in pixels of the resized images, whose sizes
                :meth:`whole_sizes` tells.
            sides: for each view, the side of its result in pixels.

        Returns:
            For each view, (n, side, side, 3) uint8.

        Raises:
            DataError: if an image can no longer be read.
        """
        heights, widths = (lengths.tolist() for lengths in self.whole_sizes(indices, shorter))
        sizes = dict(zip(indices.tolist(), zip(heights, widths, strict=True), strict=True))

        def parts(index: int, wanted: list[list[int]]) -> Iterator[Tensor]:
            smallest = 2 * shorter if self.scaled else None
            image = decode(self._unchanged(index), self.header(index), smallest=smallest)[1]
            height, width = sizes[index]
            image = resize_whole(image, height, width, self.interpolation)
            for box, side in zip(wanted, sides, strict=True):
                yield cut(image, torch.tensor([box]), side, self.interpolation)[0]

        return self._fill(indices, boxes, sides, parts)

    def _fill(
        self,
        indices: Tensor,
        boxes: Sequence[Tensor],
        sides: Sequence[int],
        parts: Callable[[int, list[list[int]]], Iterable[Tensor]],
    ) -> list[Tensor]:
        """Compute the views of each image in the pool; `parts` maps an image's number and boxes to its views."""
        out = [torch.empty((len(indices), side, side, 3), dtype=torch.uint8) for side in sides]
        numbers = indices.tolist()
        corners = [several.tolist() for several in boxes]

        def fill(rows: range) -> None:
            for row in rows:
                try:
                    for target, part in zip(out, parts(numbers[row], [view[row] for view in corners]), strict=True):
                        target[row] = part
                except Exception as error:
                    raise self._unreadable(numbers[row], error) from error

        # Several images per task, as a small one takes no longer than the overhead of a task.
        step = max(1, len(numbers) // (8 * self.workers))
        tasks = [range(start, min(start + step, len(numbers))) for start in range(0, len(numbers), step)]
        for future in [self.pool.submit(fill, rows) for rows in tasks]:
            future.result()
        return out

    def original(self, index: int, side: int) -> Image.Image:
        """Decode one whole image, in mode RGB, upright, with its longer side at most `side` pixels.

        Raises:
            DataError: if the image can no longer be read.
        """
        try:
            return decode_small(self._unchanged(index), side)
        except Exception as error:
            raise self._unreadable(index, error) from error

    def _decode(self, index: int, frame: int, boxes: Sequence[Sequence[int]], sides: Sequence[int]) -> Tensor:
        smallest = None
        if self.scaled:
            # Twice the wanted side leaves enough pixels to antialias every box.
            smallest = max(-(-2 * side * frame // min(box[2:])) for box, side in zip(boxes, sides, strict=True))
        return decode(self._unchanged(index), self.header(index), smallest=smallest)[1]

    def note(self, index: int, header: Header, fingerprint: int, identity: Identity) -> None:
        """Store what was found out about an image when it was checked."""
        for column, value in zip(self._columns, header, strict=True):
            column[index] = value
        self.fingerprints[index] = fingerprint
        if self.identity == "quick" and identity.is_file and identity.size > SMALL:
            self.mtimes[index] = identity.mtime_ns
        if identity.settled:
            self.stamps[index] = identity.stamp

    @property
    def _facts(self) -> tuple[np.ndarray, ...]:
        return (*self._columns, self.fingerprints, self.stamps, self.mtimes)

    def facts(self, begin: int, end: int) -> tuple[np.ndarray, ...]:
        """Return what is noted of consecutive images."""
        return tuple(column[begin:end] for column in self._facts)

    def note_facts(self, begin: int, end: int, facts: Sequence[np.ndarray]) -> None:
        """Store what another rank has found out about consecutive images.

        A file that has another stamp here, on a disk of this machine, is compared with its fingerprint at its first
        use.
        """
        for column, values in zip(self._facts, facts, strict=True):
            column[begin:end] = values

    def _unchanged(self, index: int) -> Encoded:
        """Return an image as it was when it was checked.

        Raises:
            OSError: if its file holds another image now: its header would not fit, and a run would be of other images.
        """
        identity = self.images.identity(index)
        encoded = self.images.encoded(index)
        if identity.stamp == tuple(self.stamps[index].tolist()):
            return encoded
        if fingerprint(encoded, self.identity) != int(self.fingerprints[index]):
            raise OSError("the file has changed")
        if self.mtimes[index] not in (_UNKNOWN, identity.mtime_ns):
            raise OSError("the file has another time of change, and data.identity=quick goes by it")
        if identity.settled:
            self.stamps[index] = identity.stamp
        return encoded

    def header(self, index: int) -> Header:
        """Return the header of an image."""
        height, width, orientation, jpeg = (column[index].item() for column in self._columns)
        return Header(height, width, orientation, jpeg)

    def _bytes(self, index: int) -> np.ndarray:
        try:
            return to_array(self._unchanged(index))
        except Exception as error:
            raise self._unreadable(index, error) from error

    def _unreadable(self, index: int, error: Exception) -> DataError:
        location = self.images.location(index)
        return DataError(
            f"cannot read image {location}: {reason_of(error, location)}. It could be read before: restore it, and the "
            "same command continues"
        )


class FileSource:
    """Encoded images, decoded in a thread pool; a :class:`.sources.Source`.

    A resident source decodes every image at once and keeps the pixels. Any other source checks the header and the end
    of every image at once and decodes at each use. With ``on_error="skip"`` it also decodes every image at once,
    because an image that fails during training cannot be left out without renumbering the others. Images in
    `decode_cache` are not decoded again. With several ranks, all of them open the same images together: each checks a
    part, and all of them end with the same rows.

    Args:
        images: the encoded images.
        labels: (N,) int64 or None.
        size: side of the square images, in pixels.
        class_names: name of each class.
        on_error: "raise", or "skip" to list unreadable images in `skipped` and leave them out.
        workers: decoding threads; by default the number of cores, at most 16.
        resident: keep the decoded images in memory: N * size * size * 3 bytes.
        scaled: decode large JPEGs at a reduced scale, see ``data.decode``.
        interpolation: the filter of the resize, see ``data.interpolation``.
        identity: what tells whether a file is still the same, see ``data.identity``.
        problems: (name, reason) of images that could not be listed; treated as unreadable.
        decode_cache: what earlier starts have found out; images that are decoded here and not kept are entered.

    Raises:
        DataError: if an image is unreadable and `on_error` is "raise", if no image is readable, or if the ranks find
            different images.
    """

    def __init__(
        self,
        images: EncodedImages,
        labels: Tensor | None,
        size: int,
        *,
        class_names: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        workers: int | None = None,
        resident: bool = True,
        scaled: bool = False,
        interpolation: Interpolation = "bilinear",
        identity: IdentityKind = "content",
        problems: Sequence[tuple[str, str]] = (),
        decode_cache: DecodeCache | None = None,
    ) -> None:
        check_same(images.names, "images")
        if not len(images):
            raise DataError("images must hold at least one image, got none")
        problems = _first_problems(problems, on_error)
        if problems and on_error == "raise":
            raise unreadable(os.path.join(images.root, problems[0][0]), problems[0][1])
        self.files: ImageFiles = ImageFiles(
            images, workers, scaled=scaled, interpolation=interpolation, identity=identity
        )
        check_annotations(len(images), labels, images.names)
        self.size = size
        self.class_names = None if class_names is None else list(class_names)
        self.skipped: list[tuple[str, str]] = list(problems)
        self.resident = resident
        self.images = torch.empty((len(images), size, size, 3), dtype=torch.uint8) if resident else None

        # Resident images are decoded in any case.
        kept, left_out = check_all(
            self.files,
            size,
            on_error=on_error,
            decode_all=resident or on_error == "skip",
            pixels=self.images,
            decode_cache=None if resident else decode_cache,
        )
        self.skipped += left_out
        if not kept:
            what = f"images of {images.root}" if images.root else "images"
            raise none_readable(len(self.skipped), what, self.skipped)
        if len(kept) < len(self.files):
            keep = torch.tensor(kept, dtype=torch.int64)
            self.files = self.files.take(keep)
            labels = None if labels is None else labels[keep]
            self.images = None if self.images is None else self.images[keep]
        self.paths = self.files.names
        self.labels = labels
        groups = self.files.images.groups
        self.groups: Tensor | None = None if groups is None else torch.from_numpy(groups)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8.

        Raises:
            DataError: if an image can no longer be read.
        """
        if self.images is not None:
            return take_rows(self.images, indices)
        whole = torch.tensor([0, 0, self.size, self.size]).expand(len(indices), 4)
        return self.files.cut(indices, self.size, [whole], [self.size])[0]

    def original(self, row: int, side: int) -> Image.Image:
        """Return the whole image of a row from its file, in mode RGB, upright, at most `side` pixels long.

        Raises:
            DataError: if the image can no longer be read.
        """
        return self.files.original(row, side)

    def keep_on(self, device: torch.device) -> None:
        """Move resident images to a device."""
        if self.images is not None:
            self.images = self.images.to(device)


def _first_problems(problems: Sequence[tuple[str, str]], on_error: str) -> list[tuple[str, str]]:
    """Return what could not be listed: on rank 0, or, if that is an error, on the first rank that met it."""
    found = distributed.gathered(list(problems))
    return next((each for each in found if each), []) if on_error == "raise" else found[0]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_pixels(box: Sequence[int], frame: int, height: int, width: int) -> Box:
    """Convert a box from `frame` units per side of the centre square of (height, width) to whole pixels."""
    edge = min(height, width)
    top, left, box_height, box_width = box
    ends = (top, top + box_height, left, left + box_width)
    y, bottom, x, right = ((2 * edge * end + frame) // (2 * frame) for end in ends)
    # A narrow box may round to nothing in an image smaller than the frame.
    y, x = min(y, edge - 1), min(x, edge - 1)
    return (height - edge) // 2 + y, (width - edge) // 2 + x, max(1, bottom - y), max(1, right - x)
