"""Every file that a command writes is there whole: a kill or a full disk leaves the old one or the new one."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from driving import TINY, Death, Process, run_here

OLD = b"the old file"

OUTPUTS = {
    "clusters.csv": ["predict", "RUN", "--data", "IMAGES", "--out", "FILE"],
    "features.npz": ["embed", "RUN", "--data", "IMAGES", "--out", "FILE"],
    "model.pt2": ["export", "RUN", "--out", "FILE"],
}
"""The commands that write where they are told to."""

RESULTS = ("assignments.csv", "model.pt", "confusion.csv", "confusion.png", "report.html")


def words_of(name: str, run: Path, images: Path, file: Path) -> list[object]:
    places = {"RUN": run, "IMAGES": images, "FILE": file}
    return [places.get(word, word) for word in OUTPUTS[name]]


def content_of(path: Path) -> bytes:
    """Return what must not differ between two writings: a zip also holds the time, and a page the time of the run."""
    content = path.read_bytes()
    return content[:4] if content.startswith(b"PK") or path.suffix == ".html" else content


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_killed_command_leaves_the_old_file_or_the_new_one(
    name: str, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    file = tmp_path / "out" / name
    words = words_of(name, finished_run, images, file)
    assert run_here(*words).code == 0
    new = content_of(file)
    for before in (True, False):
        file.write_bytes(OLD)
        killed = Process(*words, log=tmp_path / "log", death=Death(1, before=before, name=name)).result()
        assert killed.code == -signal.SIGKILL
        assert content_of(file) == (OLD if before else new)


@pytest.mark.parametrize("name", OUTPUTS)
def test_a_full_disk_keeps_the_old_file(
    name: str, finished_run: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        os.ftruncate(handle, 7)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = tmp_path / "out" / name
    file.parent.mkdir()
    file.write_bytes(OLD)
    monkeypatch.setattr(os, "fsync", full)
    assert "the disk is full" in run_here(*words_of(name, finished_run, images, file)).refusal()
    assert file.read_bytes() == OLD
    assert [path.name for path in file.parent.iterdir()] == [name]


@pytest.mark.parametrize("name", RESULTS)
@pytest.mark.parametrize("before", [True, False])
def test_a_kill_among_the_results_leaves_each_whole(
    name: str, before: bool, finished: Path, finished_run: Path, tmp_path: Path
) -> None:
    for result in RESULTS:
        (finished / result).write_bytes(OLD)
    (finished / "report.html").unlink()
    killed = Process("run", finished, log=tmp_path / "log", death=Death(1, before=before, name=name)).result()
    assert killed.code == -signal.SIGKILL
    for result in RESULTS:
        path = finished / result
        if path.exists() and path.read_bytes() != OLD:
            assert content_of(path) == content_of(finished_run / result)
    left = (finished / name).read_bytes() if (finished / name).exists() else OLD
    assert (left == OLD) == before
    assert run_here("run", finished, "--quiet").code == 0
    for result in RESULTS:
        if before or name != "report.html":
            assert content_of(finished / result) == content_of(finished_run / result)


def test_a_kill_leaves_the_old_table_of_a_sweep(tmp_path: Path) -> None:
    words = ["sweep", "digits", *TINY, "--out", tmp_path / "sweep", "--quiet"]
    assert run_here(*words, "--seeds", "1").code == 0
    old = (tmp_path / "sweep" / "sweep.json").read_bytes()
    death = Death(1, before=True, name="sweep.json")
    killed = Process(*words, "--seeds", "1-2", log=tmp_path / "log", death=death).result()
    assert killed.code == -signal.SIGKILL
    assert (tmp_path / "sweep" / "sweep.json").read_bytes() == old
