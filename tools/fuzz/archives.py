"""Changes inside archives: the members of a zip file, the header of an array, and the opcodes of a pickle."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import numpy as np

from scan_fast.runs.digests import seal, unsealed

from .mutations import TEXTS, WHOLE, mutate

_DATE = (1980, 1, 1, 0, 0, 0)

NPY_TOKENS = (
    b"'<f4'", b"'>f8'", b"'|O'", b"'<U9'", b"'<M8[ns]'", b"'|V8'", b"'<c16'", b"[('a', '<f4'), ('b', '|O')]",
    b"'fortran_order': True",
    b"(2, 3)", b"()", b"(0,)", b"(-1,)", b"(4294967296,)", b"(1000000000, 1000000000)", b"True", b"None",
    b"\x93NUMPY\x02\x00",
    b"__import__('os')", b"1e400", b"'shape': (2,), ",
)  # fmt: skip
PICKLE_TOKENS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n", b"cnumpy\ndtype\n", b"ctorch\nSize\n", b"R", b"(", b"t", b"\x85", b"\x86",
    b"\x87", b"Q", b"b", b"u",
    b"}", b"]", b")", b"0", b"2", b"q\x00", b"h\x00", b"K\x01", b"M\xff\xff", b"J\xff\xff\xff\x7f",
    b"\x8a\x09\x00\x00\x00\x00\x00\x00\x00\x00\x01",
    b"X\x01\x00\x00\x00a", b"X\xff\xff\xff\xff", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"N", b"\x88", b"\x89", b".",
    b"\x80\x02", b"\x80\x04\x95",
    b"s", b"e", b"a", b"\x81", b"\x93", b"\x8c\x01a", b"\x82\x01", b"P0\n", b"i", b"o", b"X\x03\x00\x00\x00cpu",
    b"X\x04\x00\x00\x00cuda",
    b"X\x04\x00\x00\x00meta",
)  # fmt: skip
ZIP_TOKENS = (
    b"PK\x03\x04",
    b"PK\x01\x02",
    b"PK\x05\x06",
    b"PK\x06\x06",
    b"PK\x07\x08",
    b"\x08\x00",
    b"\x63\x00",
    b"../../x",
    b"\x01\x00",
    b"\xff" * 4,
)

Members = list[tuple[str, bytes]]


def read_zip(data: bytes) -> Members:
    """Return the names and contents of the members."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def write_zip(members: Members, compression: int = zipfile.ZIP_STORED, comment: bytes = b"") -> bytes:
    """Return a zip file that is the same at any time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            info = zipfile.ZipInfo(name or "_", _DATE)
            info.compress_type = compression
            archive.writestr(info, content)
        archive.comment = comment
    return file.getvalue()


def sealed(data: bytes) -> bytes:
    """Return a zip file with its digest, as the package writes it; anything else as it is."""
    file = io.BytesIO(unsealed(data))
    try:
        seal(file)
    except ValueError:
        return data
    return file.getvalue()


def change_zip(rng: Random, members: Members, change: Callable[[str, bytes], bytes], others: Members = ()) -> bytes:  # type: ignore[assignment]
    """Return a zip file with one to three changes of its members, and a valid directory.

    Args:
        rng: the generator.
        members: of a valid file.
        change: changes the content of a member of this name.
        others: members that may be added.
    """
    changed = list(members)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if not changed:
            break
        at, kind = rng.randrange(len(changed)), rng.random()
        name, content = changed[at]
        if kind < 0.7:
            changed[at] = name, change(name, content)
        elif kind < 0.78:
            del changed[at]
        elif kind < 0.86:
            changed[at] = _renamed(rng, name), content
        elif kind < 0.93:
            changed.insert(rng.randrange(len(changed) + 1), rng.choice([*members, *others]))
        else:
            changed[at] = name, rng.choice([*members, *others])[1]
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
    return write_zip(changed, compression, rng.choice((b"", b"", b"x" * 40)))


def _renamed(rng: Random, name: str) -> str:
    text = rng.choice(
        (*TEXTS, f"{name}x", f"../{name}", f"/{name}", name.upper(), "archive/data.pkl", "data.pkl", "x.npy")
    )
    return text.encode("utf-8", "replace").decode().replace("\0", "")


def change_npy(rng: Random, data: bytes) -> bytes:
    """Return a .npy file with another header, or with changed bytes."""
    if rng.random() < 0.5:
        return mutate(rng, data, tokens=NPY_TOKENS)
    descr = rng.choice(
        (
            "<f4",
            ">f8",
            "|O",
            "<i8",
            "|u1",
            "<U3",
            "|S5",
            "<M8[ns]",
            "<c8",
            "|b1",
            "|V3",
            "<f2",
            [("a", "<f4")],
            "",
            3,
            "x9",
        )
    )
    shape: Any = tuple(rng.choice((0, 1, 2, 3, 6, *WHOLE)) for _ in range(rng.randrange(4)))
    if rng.random() < 0.1:
        shape = rng.choice(("", None, [2], (2.0,), (True,), ("a",), tuple([1] * 70)))
    fields = {"descr": descr, "fortran_order": rng.choice((False, False, True, 0, "x")), "shape": shape}
    if rng.random() < 0.1:
        fields[rng.choice(("a", "descr", "shape"))] = None
    header = repr(fields).encode("latin1", "replace")
    version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00"))
    length = (len(header) + 1).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + length + header + b"\n" + data[-rng.choice((0, 24, 48, 96)) or len(data) :]


def random_array(rng: Random) -> np.ndarray:
    """Return a small array of any type and shape, with numbers at limits."""
    shape = rng.choice(((), (0,), (1,), (3,), (6,), (0, 2), (3, 2), (6, 2), (2, 3), (3, 2, 1), (6, 1)))
    kind = rng.choice(("f4", "f8", "f2", "i8", "i4", "u8", "u1", "?", "U3", "S2", "M8[s]", "c8", "V2"))
    if kind in ("U3", "S2", "M8[s]", "V2"):
        return np.zeros(shape, dtype=kind)
    pool = np.array([0, 1, 2, -1, 127, 255, 1e30, np.nan, np.inf, -np.inf])
    values = np.array([pool[rng.randrange(len(pool))] for _ in range(int(np.prod(shape)))]).reshape(shape)
    with np.errstate(all="ignore"):
        return values.astype(kind)


def npz_of(arrays: dict[str, np.ndarray]) -> bytes:
    """Return an .npz that is the same at any time."""
    members = []
    for name, array in arrays.items():
        file = io.BytesIO()
        np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)
        members.append((f"{name}.npy", file.getvalue()))
    return write_zip(members)


def change_pickle(rng: Random, data: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return a pickle with changed opcodes and arguments."""
    return mutate(rng, data, others, PICKLE_TOKENS)
