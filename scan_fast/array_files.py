"""Reading of NumPy's files from anyone: no objects are unpickled, and sizes are compared before memory is taken."""

from __future__ import annotations

import math
import os
import zipfile
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

INFLATED = 100
"""The arrays of a compressed .npz may have so many times the size of the file together, beyond :data:`ALWAYS`."""
ALWAYS = 64 << 20
"""Bytes that the arrays of an .npz may have in any case."""


class ObjectsError(ValueError):
    """A file of NumPy with Python objects, which could run code."""


def read_npy(file: BinaryIO) -> NDArray[Any]:
    """Read the array of an .npy file.

    Raises:
        ObjectsError: if it holds Python objects.
        ValueError: if it is none, is cut off, or states a shape that does not fit its size.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    _check_header(file, size)
    file.seek(0)
    try:
        return _read_array(file)
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # such as OverflowError, for no elements in a huge shape
        raise ValueError("it is cut off or damaged") from error


def read_npz(file: BinaryIO, only: str | None = None) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz file.

    Its arrays may have :data:`ALWAYS` bytes and :data:`INFLATED` times the size of the file together. That permits what
    names and numbers compress to, and no file of zeros that fills the memory.

    Args:
        file: the file, at its beginning.
        only: read this array alone; {} if there is none.

    Raises:
        ObjectsError: if it holds Python objects.
        ValueError: if it is none, is damaged, or would take more memory than that.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            total = sum(member.file_size for member in members)
            if total > ALWAYS + INFLATED * size:
                raise ValueError(f"its arrays are said to have {total} bytes, {total // max(size, 1)} times its size")
            arrays = {}
            for member in members:
                name = member.filename.removesuffix(".npy")
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or name in arrays:
                    raise ValueError(f"NumPy did not write its member {name[:60]!r}")
                if only not in (None, name):
                    continue
                with archive.open(member) as content:
                    _check_header(content, member.file_size)
                with archive.open(member) as content:
                    arrays[name] = _read_array(content)
            return arrays
    except (ValueError, MemoryError):
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise errors of many classes
        raise ValueError(f"it is cut off or damaged ({type(error).__name__})") from error


def _read_array(file: IO[bytes]) -> NDArray[Any]:
    found: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    if found.dtype.kind == "U" and found.size and found.dtype.itemsize:
        codes = np.ascontiguousarray(found).view(np.dtype(np.uint32).newbyteorder(found.dtype.byteorder))
        if codes.max() > 0x10FFFF:  # Python fails with a SystemError when such a text is used
            raise ValueError("its texts hold characters that do not exist")
    return found


def _check_header(file: IO[bytes], size: int) -> None:
    """Refuse an array whose shape needs more bytes than there are: NumPy would take memory for all of it."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    except Exception as error:  # NumPy parses the header as Python: errors of the tokenizer and many others
        raise ValueError("it is no array of NumPy, or it is cut off or damaged") from error
    if dtype.hasobject:
        raise ObjectsError("it holds Python objects")
    if version not in ((1, 0), (2, 0)) or any(length < 0 for length in shape):
        raise ValueError("it is no array of numbers")
    if math.prod(shape) * dtype.itemsize > size - file.tell():
        raise ValueError(f"it is said to hold an array {shape} of {dtype}, for which it is too small")
