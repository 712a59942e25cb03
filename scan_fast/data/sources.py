"""Sources: numbered square uint8 images with names. See `files` for encoded images, decoded on demand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import DataError
from .decode import square, to_rgb
from .resize import Interpolation, resize_squares

if TYPE_CHECKING:
    from .files import ImageFiles


@runtime_checkable
class Source(Protocol):
    """Numbered images.

    Attributes:
        paths: unique name of each image: path of its file relative to the root, or another such as
            ``digits/train/0012``.
        labels: (N,) int64 class numbers, or None. For reporting, and for the oracle ``clustering.true_neighbors``.
        class_names: name of each class, or None.
        size: side of the square images in pixels.
        resident: True if decoded images are kept in memory, so that reading decodes nothing.
        files: encoded images, for a renderer that decodes them itself; None if there are none.
        skipped: (path, reason) of the images left out as unreadable.
        groups: (N,) int64 number of the shard (tar file, Parquet row group) of each image; None if there are none.
    """

    paths: list[str]
    labels: Tensor | None
    groups: Tensor | None
    class_names: list[str] | None
    size: int
    skipped: list[tuple[str, str]]

    @property
    def resident(self) -> bool:
        """See above."""
        ...

    @property
    def files(self) -> ImageFiles | None:
        """See above."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices, given on the CPU, as (n, size, size, 3) uint8.

        Resident images are returned on the device that keeps them, decoded ones on the CPU. Thread-safe.
        """
        ...

    def original(self, row: int, side: int) -> Image.Image:
        """Return an image to look at: whole, upright, in its own aspect ratio and not at the size of training.

        Encoded images are read from their file or container again. Arrays have no other pixels than their own.
        Thread-safe.

        Args:
            row: number of the image.
            side: largest length of the longer side in pixels. Smaller images are not enlarged.

        Returns:
            The image in mode RGB.

        Raises:
            DataError: if the image can no longer be read.
        """
        ...

    def keep_on(self, device: torch.device) -> None:
        """Move resident images to a device; do nothing if none are resident."""
        ...


def take_rows(images: Tensor, indices: Tensor) -> Tensor:
    """Select rows (n,) int64, given on the CPU, of a tensor on any device, without waiting for a GPU."""
    if images.is_cuda:
        indices = indices.pin_memory().to(images.device, non_blocking=True)
    return images.index_select(0, indices)


def check_annotations(n: int, labels: Tensor | None, paths: Sequence[str]) -> None:
    """Raise DataError unless there is a path, and a label if there are any, for each of n images."""
    if labels is not None and (labels.shape != (n,) or labels.dtype != torch.int64):
        raise DataError(f"labels must be ({n},) int64, one per image, got {tuple(labels.shape)} {labels.dtype}")
    if len(paths) != n:
        raise DataError(f"paths must name each of the {n} images, got {len(paths)}")


class TensorSource:
    """Images in memory.

    Args:
        images: (N, H, W, 3), (N, H, W, 1) or (N, H, W) uint8. Oblong images are cut to their centre square.
        labels: (N,) int64 or None.
        paths: unique name of each image; ``image/0000000`` and so on by default.
        class_names: name of each class.
        size: side to resize to with antialias, in pixels; by default the images' own. If it is larger, the images are
            kept as they are and resized at each use, which takes less memory.
        interpolation: the filter of the resize.

    Raises:
        DataError: for another shape or dtype, or labels or paths of another length.
    """

    resident = True
    files = None
    groups: Tensor | None = None

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        paths: Sequence[str] | None = None,
        class_names: Sequence[str] | None = None,
        size: int | None = None,
        interpolation: Interpolation = "bilinear",
    ) -> None:
        if images.dtype != torch.uint8:
            raise DataError(f"images must be uint8 in 0..255, got {images.dtype}")
        if images.ndim == 3:
            images = images.unsqueeze(-1)
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise DataError(f"images must be (N, H, W, 3), (N, H, W, 1) or (N, H, W), got {tuple(images.shape)}")
        if 0 in images.shape:
            raise DataError(f"images must not be empty, got {tuple(images.shape)}")
        images = _centre_squares(images.cpu())
        self.size = images.shape[1] if size is None else size
        if self.size < images.shape[1]:
            images = resize_squares(images, self.size, interpolation)
        self.images = images.contiguous()
        self._interpolation: Interpolation = interpolation
        self.labels = labels
        self.paths = [f"image/{i:07d}" for i in range(len(images))] if paths is None else list(paths)
        self.class_names = None if class_names is None else list(class_names)
        self.skipped: list[tuple[str, str]] = []
        check_annotations(len(images), labels, self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8, on the device that keeps them."""
        rows = take_rows(self.images, indices)
        return resize_squares(rows, self.size, self._interpolation).expand(-1, -1, -1, 3).contiguous()

    def original(self, row: int, side: int) -> Image.Image:
        """Return the image of a row in mode RGB, reduced if its side is longer than `side` pixels."""
        image = Image.fromarray(self.images[row].expand(-1, -1, 3).contiguous().cpu().numpy())
        image.thumbnail((side, side))
        return image

    def keep_on(self, device: torch.device) -> None:
        """Move the images to a device."""
        self.images = self.images.to(device)


def _centre_squares(images: Tensor) -> Tensor:
    """Cut (N, H, W, C) to the centre square."""
    height, width = images.shape[1:3]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return images[:, top : top + edge, left : left + edge]


class SubsetSource:
    """Some images of another source, in the given order."""

    def __init__(self, source: Source, indices: Tensor) -> None:
        self.source = source
        self.indices = indices
        self.paths = [source.paths[i] for i in indices.tolist()]
        self.labels = None if source.labels is None else source.labels[indices]
        self.groups = None if source.groups is None else source.groups[indices]
        self.class_names = source.class_names
        self.size = source.size
        self.resident = source.resident
        self.files = None if source.files is None else source.files.take(indices)
        self.skipped = source.skipped

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Tensor) -> Tensor:
        """Return the images of (n,) int64 indices as (n, size, size, 3) uint8."""
        return self.source.read(self.indices[indices])

    def original(self, row: int, side: int) -> Image.Image:
        """Return the image of a row, in mode RGB, upright, at most `side` pixels long."""
        return self.source.original(int(self.indices[row]), side)

    def keep_on(self, device: torch.device) -> None:
        """Move resident images of the whole source to a device."""
        self.source.keep_on(device)


def _item_array(item: Any, number: int) -> tuple[np.ndarray, Any]:
    """Split an item of a dataset into an (H, W, 3) uint8 array and its label."""
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


def dataset_source(dataset: Any, size: int | None = None, interpolation: Interpolation = "bilinear") -> TensorSource:
    """Read a whole torch dataset into memory.

    Args:
        dataset: has ``__len__`` and ``__getitem__``. An item is a PIL image, an array or a tensor, or a tuple of one of
            these and an integer label.
        size: side of the square images in pixels; by default the shorter side of the first image.
        interpolation: the filter of the resize.

    Raises:
        DataError: if the dataset is empty or an item is of another kind.
    """
    n = len(dataset)
    if n == 0:
        raise DataError("the dataset must not be empty")
    images, labels = torch.empty(0, dtype=torch.uint8), []
    for i in range(n):
        array, label = _item_array(dataset[i], i)
        if i == 0:
            size = size or min(array.shape[:2])
            images = torch.empty((n, size, size, 3), dtype=torch.uint8)
        images[i] = square(torch.from_numpy(array), images.shape[1], interpolation)
        labels.append(label)
    known = all(isinstance(x, (int, np.integer)) or (isinstance(x, Tensor) and x.ndim == 0) for x in labels)
    class_names = getattr(dataset, "classes", None)
    return TensorSource(
        images,
        torch.tensor([int(x) for x in labels]) if known else None,
        class_names=[str(c) for c in class_names] if known and class_names is not None else None,
    )
