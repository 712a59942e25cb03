"""The record of the images that a run is on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from ..data.decode_cache import Marks
from ..data.encoded import IdentityKind
from .reading import load_arrays


@dataclass(frozen=True)
class ImageRecord:
    """The images that a run is on, those of all splits one after another.

    Attributes:
        names: name of each image, in the order of the run.
        fingerprints: (N,) uint64, equal as long as the image is.
        kind: what the fingerprints of files are made of, see ``data.identity``.
        stamps: (N, 4) int64 of the files when they had these fingerprints, see :data:`scan_fast.data.encoded.Stamp`;
            -1 if they are not known.
        mtimes: (N,) int64 times of the last change of the files in nanoseconds, -1 if they are not known.
        splits: number of images of each split, in order.
        labels: (N,) int64 class numbers, -1 for none.
        class_names: name of each class, empty if there are none.
        began: :attr:`run_digest` of a run that began with fingerprints of the other kind; empty otherwise.
    """

    names: list[str]
    fingerprints: NDArray[np.uint64]
    kind: IdentityKind
    stamps: NDArray[np.int64]
    mtimes: NDArray[np.int64]
    splits: dict[str, int]
    labels: NDArray[np.int64]
    class_names: list[str]
    began: str = ""

    @property
    def run_digest(self) -> str:
        """The digest of the images as the run began, which the results of its stages carry."""
        return self.began or self.digest

    @property
    def digest(self) -> str:
        """32 hexadecimal digits that depend on order, splits, names and contents of all images."""
        state = hashlib.blake2b(repr((self.kind, list(self.splits.items()))).encode(), digest_size=16)
        state.update(_joined(self.names))
        state.update(self.fingerprints.astype("<u8").tobytes())
        return state.hexdigest()

    @property
    def facts(self) -> dict[str, Any]:
        """Number and digest of the images, for summary.json."""
        return {"count": len(self.names), "digest": self.digest}

    @property
    def marks(self) -> Marks | None:
        """The fingerprints with which unchanged files need not be read again; None if a name is not unique."""
        if len(set(self.names)) < len(self.names):
            return None
        return Marks(self.names, self.fingerprints, self.stamps, self.kind)

    def split(self, split: str) -> ImageRecord:
        """Return the record of one split."""
        begin = 0
        for name, count in self.splits.items():
            if name == split:
                rows = slice(begin, begin + count)
                return replace(
                    self,
                    names=self.names[rows],
                    fingerprints=self.fingerprints[rows],
                    stamps=self.stamps[rows],
                    mtimes=self.mtimes[rows],
                    splits={name: count},
                    labels=self.labels[rows],
                )
            begin += count
        raise KeyError(split)

    def dump(self, file: BinaryIO) -> None:
        """Write an .npz; lists of names are bytes, each name followed by a zero."""
        np.savez_compressed(
            file,
            names=_bytes(self.names),
            fingerprints=self.fingerprints,
            kind=np.array(self.kind),
            stamps=self.stamps,
            mtimes=self.mtimes,
            splits=_bytes(self.splits),
            counts=np.array(list(self.splits.values()), dtype=np.int64),
            labels=self.labels,
            class_names=_bytes(self.class_names),
            began=np.array(self.began),
        )

    @classmethod
    def load(cls, file: BinaryIO) -> ImageRecord:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        arrays = load_arrays(file)
        if arrays.keys() != _KEYS:
            raise ValueError(f"it must hold {', '.join(sorted(_KEYS))}, it holds {', '.join(arrays)}")
        names, splits, class_names = (_names(arrays[key]) for key in ("names", "splits", "class_names"))
        n, counts = len(names), arrays["counts"]
        shapes = {"fingerprints": (n,), "stamps": (n, 4), "mtimes": (n,), "labels": (n,), "counts": (len(splits),)}
        for key, shape in shapes.items():
            wanted = np.dtype(np.uint64 if key == "fingerprints" else np.int64)
            if arrays[key].shape != shape or arrays[key].dtype != wanted:
                found = f"{arrays[key].shape} {arrays[key].dtype}"
                raise ValueError(f"{key} must be {shape} {wanted} for its {n} names, got {found}")
        kind = str(arrays["kind"])
        if kind not in ("content", "quick") or counts.sum() != n or (n and counts.min() < 0):
            raise ValueError(f"it holds {n} names and fingerprints of the kind {kind!r} in splits of {counts.tolist()}")
        return cls(
            names,
            arrays["fingerprints"],
            cast(IdentityKind, kind),
            arrays["stamps"],
            arrays["mtimes"],
            dict(zip(splits, counts.tolist(), strict=True)),
            arrays["labels"],
            class_names,
            str(arrays["began"]),
        )


_KEYS = {"names", "fingerprints", "kind", "stamps", "mtimes", "splits", "counts", "labels", "class_names", "began"}


def _joined(names: Sequence[str] | Mapping[str, int]) -> bytes:
    return "".join(f"{name}\0" for name in names).encode(errors="surrogateescape")


def _bytes(names: Sequence[str] | Mapping[str, int]) -> NDArray[np.uint8]:
    return np.frombuffer(_joined(names), dtype=np.uint8)


def _names(stored: NDArray[Any]) -> list[str]:
    return stored.tobytes().decode(errors="surrogateescape").split("\0")[:-1]


def differences(
    then: ImageRecord, now: ImageRecord, skipped: Mapping[str, str], *, some: bool = False
) -> Iterator[str]:
    """Yield in words what has happened to images: first those that are gone or have changed, then new ones.

    Args:
        then: as the run began.
        now: as they are.
        skipped: by name, why images cannot be read.
        some: leave out what is gone and what is new.
    """
    for split in {**then.splits, **now.splits}:
        before = {} if split not in then.splits else _by_name(then.split(split))
        after = {} if split not in now.splits else _by_name(now.split(split))
        for name, (fingerprint, mtime) in before.items():
            if name not in after:
                if some:
                    continue
                yield f"{name} cannot be read ({skipped[name]})" if name in skipped else f"{name} is gone"
            elif after[name][0] != fingerprint:
                yield f"{name} has changed"
            elif after[name][1] != mtime and -1 not in (mtime, after[name][1]):
                yield f"{name} has another time of change, and data.identity=quick goes by it"
        if not some:
            yield from (f"{name} is new" for name in after if name not in before)


def _by_name(record: ImageRecord) -> dict[str, tuple[int, int]]:
    times = record.mtimes.tolist() if record.kind == "quick" else [-1] * len(record.names)
    return dict(zip(record.names, zip(record.fingerprints.tolist(), times, strict=True), strict=True))


def relabelled(then: ImageRecord, now: ImageRecord) -> str | None:
    """Return in words the first difference between the labels of the same images, None if there is none."""
    if then.class_names != now.class_names:
        pairs = enumerate(zip(then.class_names, now.class_names, strict=False))
        first = next((f"class {i} was {a} and is {b} now" for i, (a, b) in pairs if a != b), None)
        return first or f"there were {len(then.class_names)} classes and are {len(now.class_names)} now"
    rows = np.flatnonzero(then.labels != now.labels)
    if not len(rows):
        return None
    row = int(rows[0])
    before, after = (_class_of(each, row) for each in (then, now))
    return f"{then.names[row]} was of {before} and is of {after} now"


def _class_of(record: ImageRecord, row: int) -> str:
    label = int(record.labels[row])
    if label < 0:
        return "no class"
    return f"class {record.class_names[label] if label < len(record.class_names) else label}"
