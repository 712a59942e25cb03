"""Digests: an archive carries its own, the journal has those of other files, and damage is told from a killed write."""

from __future__ import annotations

import io
import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from scan_fast.runs.digests import (
    JOURNAL,
    DamagedError,
    Journal,
    UnsealedError,
    check_seal,
    digest_of,
    seal,
    unsealed,
)


def archive(kind: str) -> io.BytesIO:
    file = io.BytesIO()
    if kind == "torch":
        torch.save({"weight": torch.arange(1000.0)}, file)
    else:
        np.savez(file, rows=np.arange(1000.0))
    return file


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_an_archive_with_its_digest_is_read_as_before(kind: str, tmp_path: Path) -> None:
    file = archive(kind)
    plain = file.getvalue()
    seal(file)
    check_seal(file)
    assert file.tell() == 0
    assert unsealed(file.getvalue()) == plain == unsealed(plain)
    assert zipfile.ZipFile(file).testzip() is None
    file.seek(0)
    if kind == "torch":
        (tmp_path / "file.pt").write_bytes(file.getvalue())
        for mmap in (False, True):
            content = torch.load(tmp_path / "file.pt", weights_only=True, mmap=mmap)
            assert content["weight"].equal(torch.arange(1000.0))
    else:
        with np.load(file) as arrays:
            assert np.array_equal(arrays["rows"], np.arange(1000.0))


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_every_change_of_an_archive_is_noticed(kind: str) -> None:
    file = archive(kind)
    seal(file)
    content = file.getvalue()
    generator = random.Random(0)
    places = [*range(len(content) - 120, len(content)), *(generator.randrange(len(content)) for _ in range(200))]
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << generator.randrange(8)
        with pytest.raises((DamagedError, UnsealedError)):
            check_seal(io.BytesIO(damaged))
    for part in (0, 1, 60, len(content) // 2, len(content) - 1):
        with pytest.raises((DamagedError, UnsealedError)):
            check_seal(io.BytesIO(content[:part]))
    for more in (b"\0", content):
        with pytest.raises((DamagedError, UnsealedError)):
            check_seal(io.BytesIO(content + more))


def test_only_an_archive_without_a_comment_takes_a_digest() -> None:
    for content in (b"", b"text", archive("numpy").getvalue()[:-1]):
        with pytest.raises(ValueError, match="only a zip file without a comment"):
            seal(io.BytesIO(content))
    file = archive("numpy")
    seal(file)
    with pytest.raises(ValueError, match="only a zip file without a comment"):
        seal(file)


ONE, TWO, THREE = (digest_of(word.encode()) for word in ("one", "two", "three"))


def test_the_last_line_of_a_file_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.known("a.json") == []
    journal.add("a.json", ONE)
    journal.add("b c.json", TWO)
    journal.add("a.json", TWO, ONE)
    journal.add("a.json", THREE, TWO)
    assert journal.known("a.json") == [THREE, TWO]
    assert journal.known("b c.json") == [TWO]
    before = journal.path.stat().st_size
    journal.shorten()
    assert journal.path.stat().st_size == before, "three lines are not worth a new file"
    journal.shorten(at_least=2)
    assert journal.path.stat().st_size < before
    assert journal.known("a.json") == [THREE, TWO]
    assert journal.known("b c.json") == [TWO]


def test_every_line_of_a_file_that_grows_counts(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for digest in (ONE, TWO, THREE):
        journal.add("metrics.jsonl", digest)
    journal.shorten(("metrics.jsonl",), at_least=1)
    assert journal.known_lines("metrics.jsonl") == {ONE, TWO, THREE}
    journal.shorten(at_least=1)
    assert journal.known_lines("metrics.jsonl") == {THREE}


@pytest.mark.parametrize("kept", range(0, 40, 3))
def test_a_line_that_was_cut_short_is_no_line(kept: int, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.add("a.json", ONE)
    whole = journal.path.read_bytes()
    journal.add("a.json", TWO, ONE)
    journal.path.write_bytes(whole + journal.path.read_bytes()[len(whole) :][:kept])
    assert journal.known("a.json") == [ONE]
    journal.add("b.json", THREE)
    assert journal.known("a.json") == [ONE]
    assert journal.known("b.json") == [THREE]


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="needs O_NOFOLLOW")
def test_the_journal_is_never_another_file(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / JOURNAL).symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        Journal(tmp_path).add("a.json", ONE)
    assert target.read_text() == "precious"
