"""Artifacts written in the background: the state of the moment, whole, and no error lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from scan_fast.runs.artifacts import checkpoint
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import Checkpoint
from scan_fast.runs.writer import BackgroundWriter

FILE = checkpoint("line")


def state_of(epoch: int, **model: Any) -> Checkpoint:
    return Checkpoint(model=model, optimizer={}, stage={}, n_images=1, epoch=epoch, step=0, totals={}, seconds=0.0)


def test_the_file_holds_the_state_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, released = RunFolder(tmp_path), threading.Event()
    fsync = os.fsync

    def slow(handle: int) -> None:
        assert released.wait(30)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    weight = torch.arange(6.0).view(2, 3).t()
    state = state_of(1, w=weight)
    state.stage = {"list": [weight, 3], "pair": (weight, "x"), "none": None}
    state.totals = {"loss": torch.tensor(0.5, dtype=torch.float64)}
    with BackgroundWriter(run) as writer:
        writer.write(FILE, state)
        weight.add_(100)
        state.totals["loss"].zero_()
        state.epoch = 2
        assert not run.has(FILE)
        released.set()
    loaded = run.read(FILE)
    old = torch.arange(6.0).view(2, 3).t()
    assert loaded.model["w"].equal(old)
    assert loaded.stage["list"][0].equal(old)
    assert loaded.stage["pair"][0].equal(old)
    assert (loaded.stage["list"][1], loaded.stage["pair"][1], loaded.stage["none"]) == (3, "x", None)
    assert (loaded.totals["loss"].item(), loaded.epoch) == (0.5, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["line.pt"]


@pytest.mark.parametrize("moment", ["write", "join", "leave"])
def test_an_error_is_raised_and_the_old_file_stays(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def attempt() -> None:
        with BackgroundWriter(run) as writer:
            writer.write(FILE, state_of(1))
            writer.join()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                writer.write(FILE, state_of(2))
                assert writer._thread is not None
                writer._thread.join()
            if moment == "write":
                writer.write(FILE, state_of(3))
            elif moment == "join":
                writer.join()

    with pytest.raises(OSError, match="No space"):
        attempt()
    assert run.read(FILE).epoch == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["line.pt"]


def test_leaving_for_another_reason_finishes_the_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(run) as writer:
        writer.write(FILE, state_of(1, x=torch.zeros(1_000_000)))
        raise KeyboardInterrupt
    assert run.read(FILE).model["x"].shape == (1_000_000,)
