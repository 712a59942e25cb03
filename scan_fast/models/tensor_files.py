"""Reading of files that torch.save wrote, by anyone: no code runs, and no more memory is taken than the file has bytes.

``torch.load(weights_only=True)`` builds tensors and plain values only, but it believes what a file says of sizes. So
the file's own directory and pickle are read first, without building anything, and compared with the bytes that are
there.
"""

from __future__ import annotations

import argparse
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

ITEM_BYTES = {
    **dict.fromkeys(("ComplexDouble",), 16),
    **dict.fromkeys(("Double", "Long", "ComplexFloat"), 8),
    **dict.fromkeys(("Float", "Int", "QInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short"), 2),
    **dict.fromkeys(("Byte", "Char", "Bool", "QUInt8", "QInt8", "QUInt4x2", "QUInt2x4", "Untyped"), 1),
}
"""Bytes of an element by the name of the storage, without "Storage"."""

_DTYPES = ("b1", "u1", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
_PLAIN = (str, int, float, bytes, type(None))  # bool is an int
_SEPARATE = 5  # pickles of the older format: magic number, protocol, system, content, keys


_DAMAGED = "it is cut off, damaged or not from torch.save"


class _StatedError(ValueError):
    """A file whose statements about itself cannot be true."""


class RefusedError(_StatedError):
    """A file that holds more than tensors and plain values."""


_SMALL = 256 << 20
"""Bytes of a file that any machine has the memory for."""


def read_tensors(file: BinaryIO) -> Any:
    """Read what torch.save wrote, in its format of today or the older one, onto the CPU.

    Permitted are tensors no larger than the file, plain values, dictionaries, lists, tuples, NumPy scalars and
    :class:`argparse.Namespace`. Members of the file must not be compressed: torch.save does not compress.

    Args:
        file: the file, at its beginning.

    Raises:
        RefusedError: if it holds anything else; the message is a sentence about "it".
        ValueError: if it is cut off, damaged or of another kind; likewise.
    """
    size = file.seek(0, os.SEEK_END)
    try:
        file.seek(0)
        if reason := _other_kind(file):
            raise ValueError(reason)
        file.seek(0)
        sound = _check_archive(file, size) if zipfile.is_zipfile(file) else _check_older(file, size)
        file.seek(0)
        with warnings.catch_warnings(), torch.serialization.safe_globals(_allowed()):
            warnings.simplefilter("ignore")  # of the version of the pickle; what cannot be read is an error
            content = torch.load(file, map_location="cpu", weights_only=True)
        if not sound:
            raise ValueError(_DAMAGED)
        _check_tensors(content, size)
        return content
    except ValueError:
        raise
    except MemoryError as error:
        if size > _SMALL:
            raise
        # A damaged length: of a text of gigabytes, say.
        raise ValueError(_DAMAGED) from error
    except Exception as error:  # a damaged file may raise nearly anything
        raise _refusal(error) from error


def _allowed() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]
    return [
        # The module was renamed in NumPy 2; files of before name the old one.
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        (_dtype, "numpy.dtype"),
        *(type(np.dtype(kind)) for kind in (np.int32, np.int64, np.float32, np.float64)),
        argparse.Namespace,  # the options that training code saves beside the weights
    ]


def _dtype(kind: Any, *_: Any) -> np.dtype[Any]:
    """Stand for numpy.dtype, which would also make types of any size, and of Python objects."""
    if kind not in _DTYPES:
        raise RefusedError(f"it holds values of NumPy's type {str(kind)[:20]!r}")
    return np.dtype(kind)


# -- what a file says of itself ----------------------------------------------------------------------------------------


def _other_kind(file: BinaryIO) -> str:
    """Return what a file is by its first bytes, if that is another format than torch.save's; else ""."""
    head = file.read(512)
    if not head:
        return "it is empty"
    if head.startswith(b"PK\x03\x04"):
        return _other_zip(file)
    if head.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html", b"<head")):
        return "it is a web page, which the server sent instead of the file; download it again"
    if head.startswith(b"\x1f\x8b"):
        return "it is compressed; unpack it with gunzip"
    if head.startswith(b"\x93NUMPY"):
        return "it is a NumPy array (.npy)"
    if head[257:262] == b"ustar":
        return "it is a tar archive; extract the weight file from it"
    return ""


def _other_zip(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        return "it is cut off or damaged; download or write it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "it is a TorchScript archive, which holds code; give a file that torch.save wrote of a state dict"
    if names and all(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy arrays (.npz)"
    if not any(name.endswith("/data.pkl") for name in names):
        return "it is a zip archive that torch.save did not write"
    return ""


def _check_archive(file: BinaryIO, size: int) -> bool:
    """Compare the sizes that an archive states with each other; False if its pickle cannot be followed."""
    storages: list[tuple[str, int]] = []
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        packed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError(f"its member {packed[0][:60]!r} is compressed, and torch.save does not compress")
        if len(entries) < len(archive.infolist()) or sum(entry.file_size for entry in entries.values()) > size:
            raise ValueError("its members are said to be larger than the file")
        (name,) = (name for name in entries if name.endswith("/data.pkl"))
        with archive.open(name) as content:
            sound = _follow(content, storages)
    folder = name.removesuffix("data.pkl")
    for key, n_bytes in storages:
        entry = entries.get(f"{folder}data/{key}")
        if entry is None or entry.file_size < n_bytes:
            raise ValueError(f"its tensors {key[:20]!r} are said to have {n_bytes} bytes, which it does not hold")
    return sound


def _check_older(file: BinaryIO, size: int) -> bool:
    """Do the same for the older format, a sequence of pickles."""
    file.seek(0)
    storages: list[tuple[str, int]] = []
    sound = all(_follow(file, storages) for _ in range(_SEPARATE))
    if sum(n_bytes for _, n_bytes in set(storages)) > size:
        raise ValueError("its tensors are said to be larger than the file")
    return sound


def _follow(file: Any, storages: list[tuple[str, int]]) -> bool:
    """Add the storages that a pickle names; return False if torch has to say what is wrong with it."""
    try:
        for storage in _storages(file):
            storages.append(storage)
    except _StatedError:
        raise
    except Exception:  # a damaged pickle may fail in nearly any way
        return False
    return True


def _storages(file: Any) -> Iterator[tuple[str, int]]:
    """Yield key and size in bytes of the storages that a pickle names, without building any object."""
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "MARK":
            marks.append(len(stack))
        elif name == "GLOBAL":
            if argument.endswith(" bytearray"):
                raise RefusedError("it holds more than tensors and plain values (bytearray)")
            stack.append(_Global(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            items = to_mark()
            stack.append(tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name == "SETITEM":
            _check_keys([stack[-2]])
            del stack[-2:]
        elif name == "SETITEMS":
            _check_keys(to_mark()[::2])
        elif name == "APPENDS":
            to_mark()
        elif name in ("APPEND", "BUILD"):
            stack.pop()
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [_Object()]
        elif name == "BINPERSID":
            yield _storage(stack.pop())
            stack.append(_Object())
        elif name.startswith("EMPTY_"):
            stack.append(() if name == "EMPTY_TUPLE" else _Object())
        elif name not in ("PROTO", "STOP"):
            # Constants; what else torch does not take is for it to refuse.
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}.get(name, argument))


class _Global(str):
    """The name of a class or function in a pickle."""


class _Object:
    """Stands for an object that a pickle would build."""


def _check_keys(keys: Sequence[Any]) -> None:
    # Hashing a deeply nested tuple overflows the stack of the process.
    for key in keys:
        inner = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(each, _PLAIN) for each in inner):
            raise RefusedError("it holds dictionaries with keys that are no plain values")


def _storage(identity: Any) -> tuple[str, int]:
    kind, key, count = identity[1], identity[2], identity[4]
    if isinstance(key, bytes):
        key = key.decode("ascii")
    item = ITEM_BYTES.get(str(kind).rpartition(" ")[2].removesuffix("Storage"))
    if not isinstance(kind, _Global) or item is None or not isinstance(key, str) or not isinstance(count, int):
        raise RefusedError("it holds more than tensors and plain values")
    if count < 0:
        raise _StatedError("a tensor in it is said to have fewer than no elements")
    return key, count * item


# -- what came of it ---------------------------------------------------------------------------------------------------


def _check_tensors(content: Any, size: int) -> None:
    """Refuse tensors that repeat their elements without end or have hooks, and values that are nested without end."""
    for name, tensor in _tensors(content):
        plain = tensor.layout == torch.strided and not tensor.is_nested
        if plain and not tensor.is_meta and tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"its tensor {name[:60]!r} has the shape {tuple(tensor.shape)}, for which it is too small")
        # torch.save writes an empty dictionary; torch.load takes whatever is there.
        if tensor._backward_hooks:
            raise ValueError(f"its tensor {name[:60]!r} is said to have hooks, which torch.save does not write")


def _tensors(content: Any) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    rest: list[tuple[str, Any, int]] = [("", content, 0)]
    while rest:
        name, value, depth = rest.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping | list | tuple | set | argparse.Namespace) and id(value) not in seen:
            if depth > 50:
                raise ValueError("its values are nested too deeply")
            seen.add(id(value))
            inner = vars(value) if isinstance(value, argparse.Namespace) else value
            entries = inner.items() if isinstance(inner, Mapping) else enumerate(inner)
            rest += [(str(key), entry, depth + 1) for key, entry in entries]


def _refusal(error: Exception) -> ValueError:
    """Return why torch.load refused a file, without its advice to allow what the file holds or to unpickle freely."""
    text = str(error)
    if isinstance(error, pickle.UnpicklingError):
        if "Unsupported operand" in text:
            return ValueError("torch.save did not write it, or in another pickle protocol than 2")
        found = re.search(r"(?:GLOBAL|function|but got) (?:<class ')?(\w[\w.]+)", text)
        what = f" ({found.group(1)})" if found else ""
        return RefusedError(f"it holds more than tensors and plain values{what}")
    if isinstance(error, OSError) and error.strerror:
        return ValueError(f"it cannot be read: {error.strerror}")
    return ValueError(_DAMAGED)
