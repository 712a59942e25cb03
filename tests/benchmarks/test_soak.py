"""A short soak, and soaks that must be found out."""

from __future__ import annotations

import gc
import random
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.resources import trend
from benchmarks.soak import judge, soak
from benchmarks.soak_work import ACTIVITIES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="what a process holds is read from /proc")


@pytest.fixture
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    gc.collect()
    gc.freeze()  # a collection after each round looks at new objects alone
    yield tmp_path
    gc.unfreeze()


def test_rounds_of_work_leave_no_files_threads_or_children(own_temporary_folder: Path, tmp_path: Path) -> None:
    log = tmp_path.parent / f"{tmp_path.name}.jsonl"
    chosen = {name: ACTIVITIES[name] for name in ("operations", "views")}
    samples = soak(chosen, seconds=600, rounds=3, seed=0, log=log)
    assert len(samples) == len(log.read_text().splitlines()) == 3
    assert all(sample.temporary == samples[0].temporary for sample in samples)
    for name in ("files", "python_threads", "children"):
        assert getattr(samples[1], name) == getattr(samples[2], name), name
    assert samples[0].anonymous >= samples[0].trimmed > 1 << 20
    assert samples[2].cpu_seconds > samples[0].cpu_seconds


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", [name for name in ACTIVITIES if name not in ("operations", "views")])
def test_each_activity_does_its_work(tmp_path: Path, name: str, seed: int) -> None:
    ACTIVITIES[name](tmp_path, random.Random(seed))


KEPT: list[Any] = []


def memory(folder: Path, draw: random.Random) -> None:
    KEPT.append(bytearray(b"x" * (2 << 20)))


def objects(folder: Path, draw: random.Random) -> None:
    KEPT.extend([] for _ in range(300))


def files(folder: Path, draw: random.Random) -> None:
    KEPT.append((folder / "file").open("w"))


def threads(folder: Path, draw: random.Random) -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    KEPT.append((done, thread))


def temporary(folder: Path, draw: random.Random) -> None:
    tempfile.mkdtemp()


def test_every_kind_of_leak_is_found(own_temporary_folder: Path) -> None:
    leaks = {leak.__name__: leak for leak in (memory, objects, files, threads, temporary)}
    try:
        result = judge(soak(leaks, seconds=600, rounds=8, seed=0, log=None))
    finally:
        for kept in KEPT:
            if isinstance(kept, tuple):
                kept[0].set()
                kept[1].join()
            elif hasattr(kept, "close"):
                kept.close()
        KEPT.clear()
    assert result["verdict"] == "grows"
    found = {reason.split(":")[0] for reason in result["reasons"]}
    what = {"files changes", "threads changes", "python_threads changes", "temporary changes"}
    assert found >= {"memory", "objects of Python"} | what, result["reasons"]


def test_a_trend_is_that_of_its_line() -> None:
    generator = random.Random(0)
    rising = trend([100 + 0.5 * number + generator.gauss(0, 1) for number in range(200)])
    assert rising.low < 0.5 < rising.high
    assert rising.high - rising.low < 0.02
    assert rising.growth == pytest.approx(0.5 * 199 / 149.75, rel=0.05)
    flat = trend([100 + generator.gauss(0, 1) for _ in range(200)])
    assert flat.low < 0 < flat.high
    with pytest.raises(ValueError, match="at least 3 rounds, got 2"):
        trend([1, 2])
