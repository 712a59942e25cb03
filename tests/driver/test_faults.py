"""A sample of the faults that ``python -m tools.faults --all`` tries one by one."""

from __future__ import annotations

import errno
import io
import os
import random
import sys
from pathlib import Path
from typing import Any

import faults
import pytest
import torch
from driving import TINY, Process

from scan_fast.atomic import atomic_file
from scan_fast.cli import explain

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the files of handles are read from /proc")

SHORT = ("data.limit=96", "pretext.epochs=1", "clustering.epochs=1", "selflabel.epochs=1")
WORDS = ["run", "digits", *TINY, *SHORT, "runtime.checkpoint_seconds=0", "--quiet", "--out"]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], dict[str, Any]]:
    """How often an undisturbed run makes each call, and what it ends in."""
    folder = tmp_path_factory.mktemp("watched")
    fault = faults.Fault(str(folder / "run"), str(folder / "calls"))
    result = Process(*WORDS, folder / "run", log=folder / "log", death=fault).result()
    assert result.code == 0, result.err
    return faults.points(folder / "calls"), faults.state(folder / "run")


def test_every_kind_of_call_is_seen(watched: tuple[dict[str, int], dict[str, Any]]) -> None:
    calls, _ = watched
    # Each file is opened, written, synchronised and renamed; the lock and metrics.jsonl are opened in place.
    assert calls["replace"] >= 15
    assert calls["fsync"] >= calls["replace"]
    assert calls["open"] > calls["replace"]
    assert calls["write"] > calls["open"]
    assert calls["mkdir"] >= 1
    assert calls["unlink"] >= 1
    ways = {(fault.call, fault.way) for fault in faults.faults(calls, Path("run"), Path("log"))}
    assert len(ways) == len(faults.WAYS) * len(calls) + len(faults.WAYS_OF_WRITES) - len(faults.WAYS)


@pytest.mark.parametrize(
    ("call", "way", "end"),
    [
        ("write", "short write, ENOSPC", "refused"),
        ("write", "short write", "killed"),
        ("fsync", "EIO", "refused"),
        ("replace", "kill before", "killed"),
        ("open", "ENOSPC", "refused"),
    ],
)
def test_a_fault_costs_nothing(
    call: str, way: str, end: str, watched: tuple[dict[str, int], dict[str, Any]], tmp_path: Path
) -> None:
    calls, expected = watched
    # The first calls are those of config.yaml; the place is another one in each case.
    at = random.Random(f"{call} {way}").randint(4, calls[call])
    fault = faults.Fault(str(tmp_path / "run"), str(tmp_path / "calls"), call, at, way)
    assert faults.survive([*WORDS, tmp_path / "run"], fault, expected, tmp_path / "log") == end


def test_a_full_disk_while_weights_are_written_is_told_in_one_line(tmp_path: Path) -> None:
    """The writer of torch.save fails once more as it ends its archive; that error hid the first one."""
    old = b"the old file"
    target = tmp_path / "model.pt"
    target.write_bytes(old)

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(data)

    def write() -> None:
        with atomic_file(target):
            torch.save({"weights": torch.zeros(3000)}, Full())

    with pytest.raises(OSError, match="No space left") as caught:
        write()
    assert "the disk is full" in str(explain(caught.value))
    assert target.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]
