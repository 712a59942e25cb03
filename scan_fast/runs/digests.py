"""Digests of the files of a run folder, by which a file that was damaged or changed is known when it is read.

Archives (.pt, .npz) carry their digest inside, as the comment of the zip file. So it is renamed and copied with them.
The digests of all other files are in digests.txt, the :class:`Journal` beside them. A line is there before its file is,
and names the digest of the former file too. So whenever a process is killed, the file has a digest that is known.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import BinaryIO

from ..atomic import atomic_file, open_to_append

JOURNAL = "digests.txt"

_DIGEST_SIZE = 16
_BLOCK = 1 << 20

_END = b"PK\5\6"
"""The signature of the last record of a zip file; without a comment, it has 22 bytes and ends in a length of zero."""
_END_SIZE = 22
_MARK = b"scan-fast blake2b "
_COMMENT = len(_MARK) + 2 * _DIGEST_SIZE

_LINE = re.compile(r"([0-9a-f]{32})(?: ([0-9a-f]{32}))? (\S.*)")


class DamagedError(ValueError):
    """A file whose content is not what was written."""


class UnsealedError(ValueError):
    """A file that has no digest."""


def digest_of(content: bytes) -> str:
    """Return the BLAKE2b digest of bytes, 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).hexdigest()


def is_archive(name: str) -> bool:
    """Return whether a file of this name carries its digest inside."""
    return name.endswith((".pt", ".npz"))


# -- archives ----------------------------------------------------------------------------------------------------------


def seal(file: BinaryIO) -> None:
    """Enter the digest of a zip file into its comment.

    Args:
        file: open for reading and writing; its whole content is a zip file without a comment.

    Raises:
        ValueError: if it is something else.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _END_SIZE))
    end = file.read(_END_SIZE)
    if len(end) < _END_SIZE or not end.startswith(_END) or end[-2:] != b"\0\0":
        raise ValueError("only a zip file without a comment takes a digest")
    # The length of the comment is the last field of the file; it is not part of what the digest is of.
    comment = _MARK + _digest_of_part(file, size - 2).encode()
    file.seek(size - 2)
    file.write(len(comment).to_bytes(2, "little") + comment)


def check_seal(file: BinaryIO) -> None:
    """Compare a zip file with the digest in its comment, and return to its beginning.

    Raises:
        UnsealedError: if it has no digest.
        DamagedError: if it has another one.
    """
    size = file.seek(0, os.SEEK_END)
    content = size - 2 - _COMMENT
    file.seek(max(0, content))
    end = file.read(2 + _COMMENT)
    if content < 0 or end[:2] != _COMMENT.to_bytes(2, "little") or not end[2:].startswith(_MARK):
        raise UnsealedError("it has no digest: it was cut off, or another program or version wrote it")
    if _digest_of_part(file, content).encode() != end[2 + len(_MARK) :]:
        raise DamagedError("its content is not what was written")
    file.seek(0)


def unsealed(content: bytes) -> bytes:
    """Return the content of a zip file without the digest that it may have."""
    end = content[-2 - _COMMENT :]
    if end[:2] == _COMMENT.to_bytes(2, "little") and end[2:].startswith(_MARK):
        return content[: -2 - _COMMENT] + b"\0\0"
    return content


def _digest_of_part(file: BinaryIO, size: int) -> str:
    """Return the digest of the first bytes of a file."""
    file.seek(0)
    state = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    while size > 0 and (block := file.read(min(_BLOCK, size))):
        state.update(block)
        size -= len(block)
    return state.hexdigest()


# -- other files -------------------------------------------------------------------------------------------------------


class Journal:
    """digests.txt: the digests of the files of a folder that cannot carry their own, one file in a line.

    The last line of a file counts. It has the digest of the file and, if there was one before, that of the former file.
    Of a file that grows line by line, such as metrics.jsonl, each line has its own.

    Args:
        folder: the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL

    def known(self, name: str) -> list[str]:
        """Return the digests that the content of a file may have, none if the file has no line."""
        return self._last().get(name, [])

    def known_lines(self, name: str) -> set[str]:
        """Return the digests that the lines of a file may have."""
        return {digest for digests, other in self._lines() if other == name for digest in digests}

    def add(self, name: str, digest: str, former: str | None = None) -> None:
        """Append a line; it has reached the disk when this returns.

        Args:
            name: the file, as its path in the folder.
            digest: of its new content.
            former: of the content that it has now, None if there is none.

        Raises:
            OSError: if it cannot be written.
        """
        line = f"{' '.join(filter(None, (digest, former)))} {name}\n".encode()
        with open_to_append(self.path) as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":  # a line was cut short by a kill or a full disk
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def shorten(self, by_line: tuple[str, ...] = (), *, at_least: int = 100) -> None:
        """Remove the lines that no longer count, if there are many.

        Args:
            by_line: files of which every line counts.
            at_least: with fewer of these lines nothing is written.
        """
        found = self._lines()
        last = {name: number for number, (_, name) in enumerate(found)}
        kept = [(d, name) for number, (d, name) in enumerate(found) if name in by_line or last[name] == number]
        if len(found) - len(kept) >= at_least:
            with atomic_file(self.path, follow_links=False) as file:
                file.write("".join(f"{' '.join(digests)} {name}\n" for digests, name in kept).encode())

    def _last(self) -> dict[str, list[str]]:
        return {name: digests for digests, name in self._lines()}

    def _lines(self) -> list[tuple[list[str], str]]:
        try:
            with os.fdopen(os.open(self.path, os.O_RDONLY | _NO_LINKS | _NO_WAIT), "rb") as file:
                content = file.read()
        except FileNotFoundError:
            return []
        found = []
        for line in content.decode("utf-8", "replace").split("\n")[:-1]:
            if match := _LINE.fullmatch(line):
                found.append(([digest for digest in match.groups()[:2] if digest], match.group(3)))
        return found


_NO_LINKS = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
