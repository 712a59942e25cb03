"""Encoded images by number: one file each, or items of a container such as a tar shard."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_END = 8192

#: Bytes of an encoded image, or the path of the file that holds nothing else.
Encoded = bytes | str


class Identity(NamedTuple):
    """Identity of an encoded image for the decode cache; an image with the same identity has the same bytes.

    Attributes:
        key: absolute path; for an item of a container, followed by ``//`` and the item's key.
        size: of the file or container, in bytes.
        mtime_ns: time of its last change, in nanoseconds.
    """

    key: str
    size: int
    mtime_ns: int


class EncodedImages(ABC):
    """Images as JPEG, PNG or any other format that PIL reads, numbered from 0.

    Implementations must allow :meth:`encoded` and :meth:`identity` to be called from several threads at once.

    Args:
        names: a unique name for each image, which goes to assignments.csv, skipped.csv and error messages.
        root: folder or data set that the names are relative to.

    Attributes:
        groups: (N,) int64 number of the shard of each image, such as its tar file, if images of one shard are best read
            together; None if each image is as far from any other.
    """

    groups: NDArray[np.int64] | None = None

    def __init__(self, names: Sequence[str], root: str = "") -> None:
        self.names = list(names)
        self.root = root

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def encoded(self, index: int) -> Encoded:
        """Return the bytes of an image, or the path of its file.

        Raises:
            Exception: if the image cannot be read; the message becomes the reason that is reported with its name.
        """

    @abstractmethod
    def identity(self, index: int) -> Identity:
        """Return the identity of an image, read before its bytes are."""

    def location(self, index: int) -> str:
        """Return the full name of an image for error messages."""
        return os.path.join(self.root, self.names[index])

    def select(self, rows: Sequence[int]) -> EncodedImages:
        """Return some of the images, renumbered."""
        return Selection(self, rows)


class Selection(EncodedImages):
    """Some images of another collection, in the given order."""

    def __init__(self, images: EncodedImages, rows: Sequence[int]) -> None:
        super().__init__([images.names[row] for row in rows], images.root)
        self._images = images
        self._rows = list(rows)
        self.groups = None if images.groups is None else images.groups[self._rows]

    def encoded(self, index: int) -> Encoded:
        """Return the bytes of an image, or the path of its file."""
        return self._images.encoded(self._rows[index])

    def identity(self, index: int) -> Identity:
        """Return the identity of an image."""
        return self._images.identity(self._rows[index])

    def location(self, index: int) -> str:
        """Return the full name of an image for error messages."""
        return self._images.location(self._rows[index])

    def select(self, rows: Sequence[int]) -> EncodedImages:
        """Return some of the images, renumbered."""
        return Selection(self._images, [self._rows[row] for row in rows])


class ImagePaths(EncodedImages):
    """Images in one file each.

    Args:
        files: paths relative to the root.
        root: folder of the files; by default the paths are as seen from the working directory.
    """

    def __init__(self, files: Sequence[str | Path], root: str | Path = "") -> None:
        super().__init__([os.fspath(file) for file in files], os.fspath(root))

    def encoded(self, index: int) -> str:
        """Return the path of a file."""
        return os.path.join(self.root, self.names[index])

    def identity(self, index: int) -> Identity:
        """Return absolute path, size and time of the last change of a file."""
        path = self.encoded(index)
        return file_identity(path, os.stat(path))

    def select(self, rows: Sequence[int]) -> ImagePaths:
        """Return some of the files."""
        return ImagePaths([self.names[row] for row in rows], self.root)


def fingerprint(encoded: Encoded) -> int:
    """Return 64 bits that tell whether an encoded image is still the same, whatever the time of its file says.

    They are a hash of its size and of its first and last 8 KiB, so that large files are not read for it.

    Raises:
        OSError: if the file cannot be read.
    """
    if isinstance(encoded, bytes):
        size, ends = len(encoded), encoded if len(encoded) <= 2 * _END else encoded[:_END] + encoded[-_END:]
    else:
        with open(encoded, "rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            ends = file.read(_END)
            if size > _END:
                file.seek(max(_END, size - _END))
                ends += file.read(_END)
    return int.from_bytes(hashlib.blake2b(size.to_bytes(8, "big") + ends, digest_size=8).digest(), "big")


def file_identity(path: str, status: os.stat_result, item: str | None = None) -> Identity:
    """Return the identity of a file, or of one item in it."""
    key = os.path.abspath(path)
    return Identity(key if item is None else f"{key}//{item}", status.st_size, status.st_mtime_ns)
