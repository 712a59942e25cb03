"""Sources: numbered square uint8 images with a name each, from memory or from files."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .decode import decode, square, to_rgb
from .errors import DataError

#: A set of images that takes no more bytes than this is decoded once and kept.
MEMORY_BUDGET = 4 << 30

_In = TypeVar("_In")
_Out = TypeVar("_Out")


@runtime_checkable
class Source(Protocol):
    """Numbered images.

    Attributes:
        paths: one identifier per image: the file's path relative to its root, or a made-up one such as
            ``digits/train/0012``.
        labels: (N,) int64 class numbers, or None. Used to report, never to train.
        class_names: name of each class, or None.
        size: side of the stored square images in pixels.
        resident: whether the images lie in memory, so that reading decodes nothing.
        skipped: (path, reason) of the files left out as unreadable.
    """

    paths: list[str]
    labels: Tensor | None
    class_names: list[str] | None
    size: int
    resident: bool
    skipped: list[tuple[str, str]]

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8 on the CPU."""
        ...


def _check_annotations(n: int, labels: Tensor | None, paths: Sequence[str]) -> None:
    if labels is not None and (labels.shape != (n,) or labels.dtype != torch.int64):
        raise DataError(f"labels must be ({n},) int64, one per image, got {tuple(labels.shape)} {labels.dtype}")
    if len(paths) != n:
        raise DataError(f"paths must name each of the {n} images, got {len(paths)}")


class TensorSource:
    """Images in memory.

    Args:
        images: (N, H, W, 3), (N, H, W, 1) or (N, H, W) uint8. Oblong images are cut to their centre square.
        labels: (N,) int64 or None.
        paths: one identifier per image; ``image/0000000`` and so on by default.
        class_names: name of each class.
        size: side to resize to, with antialias; the images' own by default.

    Raises:
        DataError: for another shape or dtype, or labels or paths of another length.
    """

    resident = True

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        paths: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        size: int | None = None,
    ) -> None:
        if images.dtype != torch.uint8:
            raise DataError(f"images must be uint8 in 0..255, got {images.dtype}")
        if images.ndim == 3:
            images = images.unsqueeze(-1)
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(f"images must be (N, H, W, 3), (N, H, W, 1) or (N, H, W), got {tuple(images.shape)}")
        if 0 in images.shape:
            raise DataError(f"images must not be empty, got {tuple(images.shape)}")
        images = _square_batch(images.cpu(), size)
        self.images = images
        self.labels = labels
        self.paths = [f"image/{i:07d}" for i in range(len(images))] if paths is None else list(paths)
        self.class_names = None if class_names is None else list(class_names)
        self.size = images.shape[1]
        self.skipped: list[tuple[str, str]] = []
        _check_annotations(len(images), labels, self.paths)

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8."""
        return self.images.index_select(0, indices).expand(-1, -1, -1, 3).contiguous()


def _square_batch(images: Tensor, size: int | None) -> Tensor:
    """Cut (N, H, W, C) uint8 to the centre square and resize it to `size` with antialias."""
    height, width = images.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    images = images[:, top : top + edge, left : left + edge]
    if size is None or size == edge:
        return images.contiguous()
    resized = images.new_empty((len(images), size, size, images.shape[-1]))
    for start in range(0, len(images), 1024):
        planar = images[start : start + 1024].permute(0, 3, 1, 2).float()
        planar = torch.nn.functional.interpolate(planar, size=(size, size), mode="bilinear", antialias=True)
        resized[start : start + 1024] = planar.round_().clamp_(0, 255).permute(0, 2, 3, 1).to(torch.uint8)
    return resized


class FileSource:
    """Images in files, decoded with PIL in a thread pool.

    Sets that fit the memory budget are decoded once, here, and kept. Of larger sets every file's header is read here
    and the pixels at each use; with ``on_error="skip"`` every file is decoded here in any case, because an image that
    fails in mid-training can no longer be left out without renumbering the others.

    Args:
        files: the image files.
        labels: (N,) int64 or None.
        size: side of the square images.
        root: the folder that `paths` are relative to; by default the files are named as given.
        class_names: name of each class.
        on_error: "raise", or "skip" to list unreadable files in `skipped` and leave them out.
        workers: decoding threads; by default the number of cores, at most 16.
        memory_budget: bytes up to which the decoded images are kept.

    Raises:
        DataError: for an unreadable file with ``on_error="raise"``, or where no readable file remains.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        labels: Tensor | None,
        size: int,
        *,
        root: str | Path | None = None,
        class_names: Sequence[str] | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        workers: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if not files:
            raise DataError("files must name at least one image, got none")
        names = [Path(f).relative_to(root).as_posix() if root is not None else str(f) for f in files]
        _check_annotations(len(files), labels, names)
        self.size = size
        self.class_names = None if class_names is None else list(class_names)
        self.skipped: list[tuple[str, str]] = []
        self.resident = len(files) * size * size * 3 <= memory_budget
        self._workers = workers or min(16, os.cpu_count() or 1)
        self._files = [str(f) for f in files]
        self._images = torch.empty((len(files), size, size, 3), dtype=torch.uint8) if self.resident else None
        self._pool: ThreadPoolExecutor | None = None

        kept = self._check_all(names, on_error, decode_all=self.resident or on_error == "skip")
        if len(kept) < len(names):
            keep = torch.tensor(kept, dtype=torch.int64)
            self._files = [self._files[i] for i in kept]
            names = [names[i] for i in kept]
            labels = None if labels is None else labels[keep]
            self._images = None if self._images is None else self._images[keep]
        self.paths = names
        self.labels = labels

    def __len__(self) -> int:
        return len(self.paths)

    def _check_all(self, names: list[str], on_error: str, decode_all: bool) -> list[int]:
        """Decode every file, or only read its header; return the numbers of the good ones."""
        images = None if self._images is None else self._images.numpy()

        def check(i: int) -> str | None:
            try:
                if decode_all:
                    pixels = decode(self._files[i], self.size)
                    if images is not None:
                        images[i] = pixels
                else:
                    with Image.open(self._files[i]):
                        pass
            except Exception as error:  # PIL's plugins raise OSError, ValueError, SyntaxError, struct.error and more
                return f"{type(error).__name__}: {error}"
            return None

        kept = []
        for i, reason in enumerate(parallel_map(check, range(len(names)), self._workers)):
            if reason is None:
                kept.append(i)
            elif on_error == "skip":
                self.skipped.append((names[i], reason))
            else:
                raise DataError(f"cannot read image {self._files[i]}: {reason}. {_SKIP_ADVICE}")
        if not kept:
            raise DataError(f"none of the {len(names)} image files could be read; the first: {self.skipped[0]}")
        return kept

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8.

        Raises:
            DataError: for a file that can no longer be read.
        """
        if self._images is not None:
            return self._images.index_select(0, indices)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        batch = torch.empty((len(indices), self.size, self.size, 3), dtype=torch.uint8)
        pixels = batch.numpy()

        def fill(row: int, index: int) -> None:
            try:
                pixels[row] = decode(self._files[index], self.size)
            except Exception as error:
                raise DataError(
                    f"cannot read image {self._files[index]}: {type(error).__name__}: {error}. {_SKIP_ADVICE}"
                ) from error

        for future in [self._pool.submit(fill, row, index) for row, index in enumerate(indices.tolist())]:
            future.result()
        return batch


_SKIP_ADVICE = "Remove or repair the file, or set data.on_error=skip to leave unreadable images out."


def parallel_map(function: Callable[[_In], _Out], items: Sequence[_In], workers: int) -> Iterator[_Out]:
    """Apply a function in threads; results in order. A failure cancels what has not begun."""
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        step = 256 * workers
        for start in range(0, len(items), step):
            yield from list(pool.map(function, items[start : start + step]))


class SubsetSource:
    """Some images of another source, in the given order."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.paths = [source.paths[i] for i in indices.tolist()]
        self.labels = None if source.labels is None else source.labels[indices]
        self.class_names = source.class_names
        self.size = source.size
        self.resident = source.resident
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8."""
        return self.source.read(self.indices[indices])


def _item_array(item: Any, number: int) -> tuple[np.ndarray, Any]:
    """Split a dataset's item into an (H, W, 3) uint8 array and its label."""
    image, label = (item[0], item[1] if len(item) > 1 else None) if isinstance(item, (tuple, list)) else (item, None)
    if isinstance(image, Image.Image):
        return np.array(to_rgb(image)), label
    if isinstance(image, Tensor):
        if image.is_floating_point():
            low, high = float(image.min()), float(image.max())
            if low < 0 or high > 1:
                raise DataError(f"item {number}: a float tensor must lie in [0, 1], got [{low:g}, {high:g}]")
            image = (image * 255).round().to(torch.uint8)
        # A torch image is (C, H, W); an array is (H, W, C).
        array = (image.permute(1, 2, 0) if image.ndim == 3 and image.shape[0] in (1, 3) else image).cpu().numpy()
    else:
        array = np.asarray(image)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[-1] == 3)):
        raise DataError(f"item {number}: an image must be (H, W[, 1 or 3]) uint8, got {array.shape} {array.dtype}")
    return (np.repeat(array[..., None], 3, axis=-1) if array.ndim == 2 else array), label


def dataset_source(dataset: Any, size: int | None = None) -> TensorSource:
    """Read a whole torch dataset into memory.

    Args:
        dataset: has ``__len__`` and ``__getitem__``; items are a PIL image, an array or a tensor, alone or first in a
            tuple whose second entry is an integer label.
        size: side of the square images; by default the first image's shorter side.

    Raises:
        DataError: for an empty dataset or an item of another kind.
    """
    n = len(dataset)
    if n == 0:
        raise DataError("the dataset must not be empty")
    arrays, labels = [], []
    for i in range(n):
        array, label = _item_array(dataset[i], i)
        size = size or min(array.shape[:2])
        arrays.append(square(Image.fromarray(array), size))
        labels.append(label)
    known = all(isinstance(x, (int, np.integer)) or (isinstance(x, Tensor) and x.ndim == 0) for x in labels)
    class_names = getattr(dataset, "classes", None)
    return TensorSource(
        torch.from_numpy(np.stack(arrays)),
        torch.tensor([int(x) for x in labels]) if known else None,
        class_names=[str(c) for c in class_names] if known and class_names is not None else None,
    )
