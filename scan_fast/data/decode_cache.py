"""Records of images from earlier starts, so that the next one need not read them whole again."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .. import distributed
from .decode import MOST_PIXELS, Header
from .encoded import Identity, IdentityKind

_VERSION = 3


class Marks:
    """Fingerprints of images by name, with the stamps that their files had.

    Args:
        names: (N,) unique names.
        fingerprints: (N,) uint64.
        stamps: (N, 4) int64, see :data:`.encoded.Stamp`; negative if they are not known.
        kind: what the fingerprints are made of.
    """

    def __init__(
        self, names: Sequence[str], fingerprints: NDArray[np.uint64], stamps: NDArray[np.int64], kind: IdentityKind
    ) -> None:
        self._rows = {name: row for row, name in enumerate(names)}
        self._fingerprints, self._stamps, self._kind = fingerprints, stamps, kind

    def recall(self, name: str, identity: Identity, kind: IdentityKind) -> int | None:
        """Return the fingerprint of an image whose file is as it was; None if it is not, or that is not known."""
        row = self._rows.get(name)
        if row is None or kind != self._kind or tuple(self._stamps[row].tolist()) != identity.stamp:
            return None
        return int(self._fingerprints[row])


class DecodeCache:
    """Headers and fingerprints of images that were decoded whole without an error, by their identity.

    An entry counts only if all of the identity agrees: path, size, times of the last change and inode. Unreadable
    images have no entry: they are few, and the cause, such as a permission or a missing package, may go away without a
    change of the file.

    Args:
        content: what :meth:`to_bytes` returned at the last start. Anything else, such as a damaged record or one of
            another version, counts as an empty record.

    Attributes:
        marks: fingerprints of images that need not have been decoded; None if there are none.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._former = _entries(content)
        self._entries: dict[str, list[int]] = {}
        self.marks: Marks | None = None

    @property
    def changed(self) -> bool:
        """True if images were recalled or noted and the record differs from the former one."""
        return bool(self._entries) and self._entries != self._former

    def recall(self, identity: Identity, kind: IdentityKind) -> tuple[Header, int] | None:
        """Return header and fingerprint of an image that has an entry, and keep the entry; None if it has none."""
        entry = self._former.get(identity.key)
        if entry is None or tuple(entry[:4]) != identity.stamp or entry[-1] != _KINDS.index(kind):
            return None
        self._entries[identity.key] = entry
        height, width, orientation, jpeg, fingerprint = entry[4:-1]
        return Header(height, width, orientation, bool(jpeg)), fingerprint

    def note(self, identity: Identity, header: Header, fingerprint: int, kind: IdentityKind) -> None:
        """Enter an image that was decoded after its identity had been read."""
        if identity.settled:
            self._entries[identity.key] = [*identity.stamp, *map(int, header), fingerprint, _KINDS.index(kind)]

    def fingerprint(self, name: str, identity: Identity, kind: IdentityKind) -> int | None:
        """Return the fingerprint of an image by its name if its file is as it was noted, see :class:`Marks`."""
        return None if self.marks is None else self.marks.recall(name, identity, kind)

    def exchange(self) -> None:
        """Add the entries of all ranks."""
        for entries in distributed.gathered(self._entries) if distributed.several() else ():
            self._entries.update(entries)

    def to_bytes(self) -> bytes:
        """Return the entries of the images that were recalled or noted."""
        return json.dumps({"version": _VERSION, "files": self._entries}, sort_keys=True, separators=(",", ":")).encode()


_KINDS: tuple[IdentityKind, ...] = ("content", "quick")
"""Numbers of the kinds of fingerprints in a record."""
_LENGTH = 10
"""Numbers of an entry: the stamp, the header, the fingerprint and its kind."""


def _entries(content: bytes) -> dict[str, list[int]]:
    try:
        record = json.loads(content)
        files = record["files"] if record["version"] == _VERSION else {}
        good = all(_is_sound(entry) for entry in files.values())
        return dict(files) if good else {}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}


def _is_sound(entry: list[int]) -> bool:
    """Return whether an entry may be of an image that was decoded: others do not fit into the columns of a source."""
    if len(entry) != _LENGTH or not all(isinstance(n, int) and 0 <= n < 1 << 64 for n in entry):
        return False
    stamp, (height, width, orientation, jpeg, _, kind) = entry[:4], entry[4:]
    sound = 0 < height * width <= MOST_PIXELS and 1 <= orientation <= 8 and jpeg <= 1
    return sound and max(stamp) < 1 << 63 and kind < len(_KINDS)
