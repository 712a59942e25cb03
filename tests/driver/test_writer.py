"""Checkpoints written in the background: what was true at the moment, whole, and no error lost."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from scan_fast.runs.folder import RunFolder
from scan_fast.runs.writer import BackgroundWriter


def test_the_file_holds_the_state_of_the_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, released = RunFolder(tmp_path), threading.Event()
    fsync = os.fsync

    def slow(handle: int) -> None:
        assert released.wait(30)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slow)
    weight = torch.arange(6.0).view(2, 3).t()
    state: dict[str, Any] = {"model": {"w": weight}, "list": [weight, 3], "pair": (weight, "x"), "none": None, "n": 1}
    with BackgroundWriter(run) as writer:
        writer.save("checkpoints/a.pt", state)
        weight.add_(100)
        state["n"] = 2
        assert not run.has("checkpoints/a.pt")
        released.set()
    loaded = run.load("checkpoints/a.pt")
    old = torch.arange(6.0).view(2, 3).t()
    assert loaded["model"]["w"].equal(old)
    assert loaded["list"][0].equal(old)
    assert loaded["pair"][0].equal(old)
    assert (loaded["list"][1], loaded["pair"][1], loaded["none"], loaded["n"]) == (3, "x", None, 1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["a.pt"]


@pytest.mark.parametrize("moment", ["save", "join", "leave"])
def test_an_error_comes_up_and_the_former_file_stays(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def attempt() -> None:
        with BackgroundWriter(run) as writer:
            writer.save("a.pt", {"x": torch.tensor(1)})
            writer.join()
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", full)
                writer.save("a.pt", {"x": torch.tensor(2)})
                assert writer._thread is not None
                writer._thread.join()
            if moment == "save":
                writer.save("a.pt", {"x": torch.tensor(3)})
            elif moment == "join":
                writer.join()

    with pytest.raises(OSError, match="No space"):
        attempt()
    assert run.load("a.pt")["x"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_leaving_for_another_reason_finishes_the_file(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(run) as writer:
        writer.save("a.pt", {"x": torch.zeros(1_000_000)})
        raise KeyboardInterrupt
    assert run.load("a.pt")["x"].shape == (1_000_000,)
