"""Atomic writing: whatever fails, a name holds the old content or the new one."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest

from scan_fast.atomic import atomic_file, is_leftover, remove_leftovers


def write_bytes(path: str | Path, content: bytes) -> None:
    with atomic_file(path) as file:
        file.write(content)


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "a.bin"
    with atomic_file(path) as file:
        file.write(b"0123")
        file.seek(0)
        file.write(b"9")
        assert not path.exists()
        assert [is_leftover(other) for other in path.parent.iterdir()] == [True]
    assert path.read_bytes() == b"9123"
    assert only(path.parent) == ["a.bin"]


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no files in memory here")
def test_files_in_memory_are_written_atomically() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "new" / "a.bin"
        with pytest.raises(KeyError), atomic_file(path) as file:
            file.write(b"half")
            raise KeyError
        assert only(path.parent) == []
        write_bytes(path, b"whole")
        assert path.read_bytes() == b"whole"


@pytest.mark.parametrize(
    ("function", "old"),
    [
        ("fsync", b"old"),
        ("replace", b"old"),
        ("chmod", b"old"),
        (None, b"old"),
        ("fsync", None),
        ("replace", None),
        (None, None),
    ],
)
def test_a_failure_keeps_the_old_file(
    function: str | None, old: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.bin"
    if old is not None:
        path.write_bytes(old)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        if function is not None:
            patch.setattr(os, function, full)
        with atomic_file(path) as file:
            file.write(b"new")
            if function is None:
                full()
    assert only(tmp_path) == ([] if old is None else ["a.bin"])
    assert old is None or path.read_bytes() == old


def test_permissions_are_those_of_any_file_and_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a"
    former = os.umask(0o027)
    try:
        write_bytes(path, b"1")
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        path.chmod(0o604)
        write_bytes(path, b"2")
    finally:
        os.umask(former)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604
    assert path.read_bytes() == b"2"


def test_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "file")
    write_bytes(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_bytes() == b"1"


def test_devices_are_written_directly(tmp_path: Path) -> None:
    write_bytes("/dev/null", b"1")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    reader, writer = os.pipe()
    try:
        write_bytes(f"/dev/fd/{writer}", b"through")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
        os.close(writer)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        write_bytes(tmp_path, b"1")


def test_leftovers_are_told_from_other_files(tmp_path: Path) -> None:
    for name in (".a.pt.0123.tmp", "a.tmp", ".hidden", "b.pt"):
        (tmp_path / name).write_bytes(b"")
    remove_leftovers(tmp_path)
    assert only(tmp_path) == [".hidden", "a.tmp", "b.pt"]
    remove_leftovers(tmp_path / "nowhere")
