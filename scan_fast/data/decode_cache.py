"""Record of images that were decoded whole without an error, so that the next start need not decode them again."""

from __future__ import annotations

import json
import time

from .. import distributed
from .decode import Header
from .encoded import Identity

_VERSION = 2

# A file written this shortly before it was read may be written again without a change of its time.
_SETTLED_NS = 2_000_000_000


class DecodeCache:
    """Headers and fingerprints of readable images by identity: path, size and time of the last change of the file.

    An entry counts only if all three agree. Unreadable images have no entry: they are few, and the cause, such as a
    permission or a missing package, may go away without a change of the file.

    Args:
        content: what :meth:`to_bytes` returned at the last start. Anything else, such as a damaged record or one of
            another version, counts as an empty record.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._former = _entries(content)
        self._entries: dict[str, list[int]] = {}

    @property
    def changed(self) -> bool:
        """True if images were recalled or noted and the record differs from the former one."""
        return bool(self._entries) and self._entries != self._former

    def recall(self, identity: Identity) -> tuple[Header, int] | None:
        """Return header and fingerprint of an image that has an entry, and keep the entry; None if it has none."""
        entry = self._former.get(identity.key)
        if entry is None or entry[:2] != [identity.size, identity.mtime_ns]:
            return None
        self._entries[identity.key] = entry
        height, width, orientation, jpeg, fingerprint = entry[2:]
        return Header(height, width, orientation, bool(jpeg)), fingerprint

    def note(self, identity: Identity, header: Header, fingerprint: int) -> None:
        """Enter an image that was decoded after its identity had been read."""
        if identity.mtime_ns < time.time_ns() - _SETTLED_NS:
            self._entries[identity.key] = [identity.size, identity.mtime_ns, *map(int, header), fingerprint]

    def exchange(self) -> None:
        """Add the entries of all ranks."""
        for entries in distributed.gathered(self._entries) if distributed.several() else ():
            self._entries.update(entries)

    def to_bytes(self) -> bytes:
        """Return the entries of the images that were recalled or noted."""
        return json.dumps({"version": _VERSION, "files": self._entries}, sort_keys=True, separators=(",", ":")).encode()


def _entries(content: bytes) -> dict[str, list[int]]:
    try:
        record = json.loads(content)
        files = record["files"] if record["version"] == _VERSION else {}
        good = all(len(entry) == 7 and all(isinstance(n, int) for n in entry) for entry in files.values())
        return dict(files) if good else {}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
