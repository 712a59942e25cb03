"""Atomic writing of files: after a crash, a name holds its old content or the new one, each complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".tmp"


@contextmanager
def atomic_file(path: str | Path, *, make_folders: bool = True, follow_links: bool = True) -> Iterator[BinaryIO]:
    """Open ``path`` for writing; the file appears under its name when the block ends without an error.

    The content goes to a temporary file beside ``path``, reaches the disk and is then renamed. If the block raises, the
    temporary file is removed and ``path`` keeps its old content. A killed process leaves the temporary file behind, see
    :func:`remove_leftovers`. Devices and pipes, such as /dev/stdout, are written directly.

    Args:
        path: the file to write.
        make_folders: create missing folders.
        follow_links: write to what a symbolic link points to, devices and pipes included. Without it, whatever has the
            name is replaced by a regular file.

    Yields:
        A binary file, which can seek and be read unless it is a device or a pipe.

    Raises:
        OSError: if the folder or the file cannot be written.
    """
    path = Path(path).expanduser()
    # /dev/stdout may be a file, but is to be written to, not replaced. /dev/shm holds ordinary files, in memory.
    device = path.is_relative_to("/dev") and not path.is_relative_to("/dev/shm")
    if follow_links and (device or (path.exists() and not path.is_file())):
        with path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path)) if follow_links else path
    if make_folders:
        target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
    # Unlike tempfile, os.open gives the permissions of any new file (those that the umask leaves).
    handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if target.is_file() and not (target.is_symlink() and not follow_links):
            os.chmod(temporary, target.stat().st_mode & 0o777)
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        if isinstance(error, RuntimeError) and (cause := _system_error(error)) is not None:
            raise cause from None
        raise


def _system_error(error: BaseException) -> OSError | None:
    """Return the error of the system that led to another: torch.save fails once more as it ends its archive."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, OSError):
        seen = seen.__cause__ or seen.__context__
    return seen


def open_to_append(path: Path) -> BinaryIO:
    """Open a file for reading, and for writing at its end; make it if it is missing.

    Raises:
        OSError: if it cannot be opened, or is a symbolic link: what it points to is left alone.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.fdopen(os.open(path, flags, 0o666), "r+b")


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, atomically: a hard link, or a copy if the file system has none.

    Files that are only ever replaced as a whole (:func:`atomic_file`) stay apart: a change of one leaves the other.

    Args:
        source: the file.
        target: the new name; missing folders are created, and a file of this name is replaced.

    Raises:
        OSError: if the file cannot be read or written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_SUFFIX}")
    try:
        os.link(source, temporary)
    except OSError:  # another file system, or one without links
        with source.open("rb") as content, atomic_file(target) as file:
            shutil.copyfileobj(content, file)
        return
    os.replace(temporary, target)
    temporary.unlink(missing_ok=True)  # renaming does nothing if both are names of one file


def is_leftover(path: Path) -> bool:
    """Return whether ``path`` is named like the temporary file of a process that was killed while it wrote."""
    return path.name.startswith(".") and path.name.endswith(_SUFFIX)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes left in ``folder``; no process may be writing there."""
    for path in folder.glob(f".*{_SUFFIX}"):
        path.unlink(missing_ok=True)
