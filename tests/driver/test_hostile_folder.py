"""A run folder that somebody else has prepared: no file outside it is touched, and nothing hangs."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from driving import TINY, Process, run_here

from scan_fast.runs.artifacts import METRICS, SUMMARY
from scan_fast.runs.digests import JOURNAL
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import MetricsEntry, Summary

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "target")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "target"
    file.write_text("precious")
    return file


@pytest.mark.parametrize("make", [link, pipe, folder])
def test_a_lock_that_is_no_file_is_refused(make: Callable[[Path], None], target: Path) -> None:
    out = target.parent / "out"
    out.mkdir()
    make(out / ".lock")
    result = Process("run", "digits", *TINY, "--out", out, "--quiet", log=target.parent / "log").result(30)
    assert f"{out}/.lock is no regular file, so it cannot be locked; remove it" in result.refusal()
    assert target.read_text() == "precious"
    assert {path.name for path in out.iterdir()} == {".lock"}


def test_a_lock_keeps_what_is_in_it(target: Path) -> None:
    out = target.parent / "out"
    out.mkdir()
    os.link(target, out / ".lock")
    with RunFolder(out):
        pass
    assert target.read_text() == "precious"


@pytest.mark.parametrize("name", ["summary.json", "config.yaml", ".config.yaml"])
def test_a_link_in_place_of_a_file_is_replaced(name: str, target: Path) -> None:
    out = target.parent / "out"
    out.mkdir()
    (out / name).symlink_to(target)
    words = ("run", "digits", *TINY, "--out", out, "--quiet")
    if name == "summary.json":
        with RunFolder(out) as run:
            run.write(SUMMARY, Summary())
    else:
        assert run_here(*words, "mining.k=159").code in (0, 2)
    assert target.read_text() == "precious"


def test_metrics_are_not_appended_to_another_file(target: Path) -> None:
    out = target.parent / "out"
    out.mkdir()
    for name in (METRICS.name, JOURNAL):
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(target)
        with pytest.raises(OSError, match="symbolic links"):
            RunFolder(out).append_metrics(MetricsEntry("pretext", 1, 1, 0.0, {}))
        (out / name).unlink()
    assert target.read_text() == "precious"


def test_files_have_the_permissions_that_the_user_wants(tmp_path: Path) -> None:
    """Whatever writes them: NumPy, torch, the csv module, a thread or pyarrow."""
    former = os.umask(0o077)
    try:
        assert run_here("run", "digits", *TINY, "evaluation.thumbnails=20", "--out", tmp_path / "run").code == 0
    finally:
        os.umask(former)
    found = [tmp_path / "run", *(tmp_path / "run").rglob("*")]
    assert len(found) > 20
    assert [path for path in found if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
