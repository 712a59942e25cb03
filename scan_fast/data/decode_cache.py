"""Which files have been decoded whole and found good, so that the next start need not decode them all again."""

from __future__ import annotations

import json
import os
import time

from .decode import Header

_VERSION = 1

# A file that was written this shortly before it was read may be written again without its time showing it.
_SETTLED_NS = 2_000_000_000


class DecodeCache:
    """A record of good files: what their headers say, by absolute path, size and time of the last change.

    An entry counts only where all three agree. Unreadable files are not in it: they are few, and what is wrong with
    one, such as a permission or a package that is missing, may be put right without changing it.

    Args:
        content: what :meth:`to_bytes` returned at the last start. Anything else, such as a damaged record or one of
            another version, counts as none.
    """

    def __init__(self, content: bytes = b"") -> None:
        self._former = _entries(content)
        self._entries: dict[str, list[int]] = {}

    @property
    def changed(self) -> bool:
        """Whether files were looked at, and the record of them differs from the former one."""
        return bool(self._entries) and self._entries != self._former

    def recall(self, path: str, status: os.stat_result) -> Header | None:
        """Return the header of a file that was good and has not changed since, and keep its entry; else None."""
        path = os.path.abspath(path)
        entry = self._former.get(path)
        if entry is None or entry[:2] != [status.st_size, status.st_mtime_ns]:
            return None
        self._entries[path] = entry
        height, width, orientation, jpeg = entry[2:]
        return Header(height, width, orientation, bool(jpeg))

    def note(self, path: str, status: os.stat_result, header: Header) -> None:
        """Enter a file that was decoded after its status had been read."""
        if status.st_mtime_ns < time.time_ns() - _SETTLED_NS:
            self._entries[os.path.abspath(path)] = [status.st_size, status.st_mtime_ns, *map(int, header)]

    def to_bytes(self) -> bytes:
        """Return the entries of the files that were recalled or noted."""
        return json.dumps({"version": _VERSION, "files": self._entries}, sort_keys=True, separators=(",", ":")).encode()


def _entries(content: bytes) -> dict[str, list[int]]:
    try:
        record = json.loads(content)
        files = record["files"] if record["version"] == _VERSION else {}
        good = all(len(entry) == 6 and all(isinstance(n, int) for n in entry) for entry in files.values())
        return dict(files) if good else {}
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}
