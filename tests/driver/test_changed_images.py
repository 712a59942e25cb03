"""Folders that change while a run goes on: one line names the file, and once it is back the same command continues."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from driving import TINY_FOLDER, Death, Process, assignments, contents, fill, picture, results, run_here, summary

from scan_fast.data.files import ImageFiles

WORDS = (*TINY_FOLDER, "--clusters", "3", "--quiet", "pretext.epochs=2")
VICTIM = "007.png"


def remove(file: Path) -> None:
    file.unlink()


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def replace(file: Path) -> None:
    picture(100).save(file)


CHANGES = {"removed": remove, "truncated": truncate, "replaced": replace}


@pytest.fixture(params=list(CHANGES))
def change(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return CHANGES[request.param]


@pytest.mark.parametrize("on_error", ["raise", "skip"])
@pytest.mark.parametrize("resident", ["host", "files"])
def test_a_change_between_two_starts(
    resident: str, on_error: str, change: Callable[[Path], None], images: Path, tmp_path: Path
) -> None:
    words = ("run", "--data", images, *WORDS, f"data.resident={resident}", f"data.on_error={on_error}", "--out")
    assert run_here(*words, tmp_path / "whole").code == 0
    killed = Process(*words, tmp_path / "out", log=tmp_path / "log", death=Death(1, name="neighbors.npz")).result()
    assert killed.code == -signal.SIGKILL, killed.err
    before, original = contents(tmp_path / "out"), (images / VICTIM).read_bytes()
    change(images / VICTIM)
    assert VICTIM in run_here(*words, tmp_path / "out").refusal()
    after = contents(tmp_path / "out")
    assert {name for name in before if after[name] != before[name]} <= {"decode-cache.json"}
    (images / VICTIM).write_bytes(original)  # with another time of change
    result = run_here(*words, tmp_path / "out")
    assert result.code == 0, result.err
    assert results(tmp_path / "out") == results(tmp_path / "whole")


@pytest.mark.parametrize("moment", ["batch", "end_epoch"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_change_in_training(
    on_error: str,
    moment: str,
    change: Callable[[Path], None],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file changes while the second epoch's batches are read, or as the epoch is evaluated."""
    settings = ("data.resident=files", "data.workers=1", "clustering.epochs=2", "runtime.checkpoint_seconds=1000")
    words = ("run", "--data", images, *WORDS, *settings, f"data.on_error={on_error}", "--out")
    assert run_here(*words, tmp_path / "whole").code == 0
    original = (images / VICTIM).read_bytes()
    calls = 0
    cut = ImageFiles.cut

    def changing(self: ImageFiles, *arguments: object, **named: object) -> object:
        nonlocal calls
        calls += 1
        if calls == (5 if moment == "batch" else 15):
            change(images / VICTIM)
        return cut(self, *arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ImageFiles, "cut", changing)
        message = run_here(*words, tmp_path / "out").refusal()
    assert f"cannot read image {images / VICTIM}: " in message
    assert "It could be read before: restore it, and the same command continues" in message
    stage = "pretext" if moment == "batch" else "clustering"
    assert (tmp_path / "out" / "checkpoints" / f"{stage}.pt").is_file(), "what was trained is kept"
    (images / VICTIM).write_bytes(original)
    result = run_here(*words, tmp_path / "out")
    assert result.code == 0, result.err
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_file_that_was_only_touched_is_the_same(images: Path, tmp_path: Path) -> None:
    words = ("run", "--data", images, *WORDS, "data.resident=files", "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    before = results(tmp_path / "out")
    for file in images.iterdir():
        file.touch()
    assert run_here(*words).code == 0
    assert results(tmp_path / "out") == before


def test_a_run_on_more_images_starts_again(images: Path, tmp_path: Path) -> None:
    words = ("run", "--data", images, *WORDS, "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    fill(images, 3, first=50)
    assert "050.png is new, 051.png is new, 052.png is new. Undo this" in run_here(*words).refusal()
    message = run_here("cluster", tmp_path / "out", "--again", "--quiet").refusal()
    assert "050.png is new" in message
    result = run_here("run", tmp_path / "out", "--again", "--quiet")
    assert result.code == 0, result.err
    assert len(assignments(tmp_path / "out")) == 39
    assert run_here("run", tmp_path / "out", "--quiet").code == 0


def test_before_anything_is_learned_the_images_may_change(images: Path, tmp_path: Path) -> None:
    words = ("--data", images, *WORDS, "--out", tmp_path / "out")
    assert "mining.k=50 must be below" in run_here("run", *words, "mining.k=50").refusal()
    (images / VICTIM).unlink()
    assert run_here("run", *words, "selflabel=null").code == 0
    assert len(assignments(tmp_path / "out")) == 35


def test_a_repaired_file_is_named_as_new(images: Path, tmp_path: Path) -> None:
    original = (images / VICTIM).read_bytes()
    truncate(images / VICTIM)
    words = ("run", "--data", images, *WORDS, "data.on_error=skip", "--out", tmp_path / "out")
    assert run_here(*words).code == 0
    finished = summary(tmp_path / "out")
    (images / VICTIM).write_bytes(original)
    assert f"{VICTIM} is new" in run_here(*words).refusal()
    assert summary(tmp_path / "out") == finished
