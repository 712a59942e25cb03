"""Encoded images by number: one file each, or items of a container such as a tar shard."""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

_END = 8192
_BLOCK = 1 << 20
_SIGNED = (1 << 63) - 1

SMALL = 2 * _END
"""A file of no more bytes is read whole for its fingerprint, of whatever kind."""

SETTLED_NS = 2_000_000_000
"""A file that was written this shortly before it was read may be written again without a change of its times."""

#: Bytes of an encoded image, or the path of the file that holds nothing else.
Encoded = bytes | str

#: What a fingerprint is made of, see :func:`fingerprint` and ``data.identity``.
IdentityKind = Literal["content", "quick"]

Stamp = tuple[int, int, int, int]
"""Size in bytes, times of the last change of content and of inode in nanoseconds, and number of the inode of a file."""


class Identity(NamedTuple):
    """Identity of an encoded image: an image with the same identity has the same bytes.

    No program can set the time of the inode's last change. So a file that was exchanged for one of the same size and
    time has another identity, and so has one whose time was set back.

    Attributes:
        key: absolute path; for an item of a container, followed by ``//`` and the item's key.
        size: of the file or container, in bytes.
        mtime_ns: time of the last change of its content, in nanoseconds.
        ctime_ns: time of the last change of its inode, in nanoseconds; 0 if it is not known.
        inode: number of its inode; 0 if it is not known.
    """

    key: str
    size: int
    mtime_ns: int
    ctime_ns: int = 0
    inode: int = 0

    @property
    def stamp(self) -> Stamp:
        """All but the key."""
        return self[1:]

    @property
    def is_file(self) -> bool:
        """True for a file that holds nothing but the image."""
        return "//" not in self.key[1:]

    @property
    def settled(self) -> bool:
        """True if a change from now on gives another identity, whatever the resolution of the file system's times."""
        return max(self.mtime_ns, self.ctime_ns) < time.time_ns() - SETTLED_NS


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
        """Return the identity of an image as it is now; called before its bytes are read."""

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


def fingerprint(encoded: Encoded, kind: IdentityKind = "content") -> int:
    """Return 64 bits that tell whether an encoded image is still the same, whatever the times of its file say.

    Args:
        encoded: bytes of an image, or the path of its file.
        kind: "content": a hash of all bytes. "quick": of a file the size and the first and last 8 KiB, so that a large
            one is not read; of bytes, all.

    Raises:
        OSError: if the file cannot be read.
    """
    state = hashlib.blake2b(digest_size=8)
    if isinstance(encoded, bytes):
        state.update(encoded)
    else:
        with open(encoded, "rb", buffering=0) as file:
            if kind == "content":
                while block := file.read(_BLOCK):
                    state.update(block)
            else:
                size = os.fstat(file.fileno()).st_size
                state.update(size.to_bytes(8, "big") + file.read(_END))
                if size > _END:
                    file.seek(max(_END, size - _END))
                    state.update(file.read(_END))
    return int.from_bytes(state.digest(), "big")


def file_identity(path: str, status: os.stat_result, item: str | None = None) -> Identity:
    """Return the identity of a file, or of one item in it."""
    key = os.path.abspath(path)
    # Some file systems number their inodes with 64 bits; records hold signed numbers.
    stamp = status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino & _SIGNED
    return Identity(key if item is None else f"{key}//{item}", *stamp)
