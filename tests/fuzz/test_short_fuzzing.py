"""A short run of every target, the same on each machine, and the harness itself: what it must see, it sees."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tools.fuzz.__main__ import main, shares
from tools.fuzz.running import run_tasks, tasks_of
from tools.fuzz.target import Target
from tools.fuzz.targets import TARGETS
from tools.fuzz.worker import Batch

INPUTS = 1500
SEED = 1


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", "")  # a target sets it
        folder = tmp_path_factory.mktemp("shared")
        yield {name: kind(folder) for name, kind in TARGETS.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_ends_in_anything_but_a_result_or_a_refusal(name: str, targets: dict[str, Target]) -> None:
    target = targets[name]
    inputs = shares(list(targets.values()), INPUTS)[name]
    batch = run_tasks(tasks_of(target, SEED, inputs))[name]
    assert batch.inputs == inputs == batch.accepted + batch.refused + len(batch.findings)
    assert not batch.findings, "\n".join(f"{f.kind}: {f.what} ({f.place})\n{f.command}" for f in batch.findings)


@pytest.mark.parametrize(
    "name", ["config-values", "json-files", "npz-files", "image-decoding", "tar-shards", "file-names"]
)
def test_an_input_depends_on_its_number_alone(name: str, targets: dict[str, Target]) -> None:
    target = targets[name]
    first = [repr(target.make(3, index)) for index in (5, 6)]
    assert [repr(target.make(3, index)) for index in (6, 5)] == first[::-1]
    assert len({*first, repr(target.make(4, 5))}) == 3


# -- the harness -------------------------------------------------------------------------------------------------------


def _segfault() -> None:
    import ctypes

    ctypes.string_at(0)


def _spin() -> None:
    while True:
        pass


def _memory() -> None:
    bytearray(b"\1") * (64 << 20)


def _deny() -> None:
    raise ValueError("no\nlike this")


def _catch() -> None:
    try:
        socket.socket().connect(("127.0.0.1", 9))
    except BaseException as error:
        raise ValueError("hidden") from error


class Hostile(Target):
    """Does on purpose what an input must not lead to; every second input is harmless."""

    name = "hostile"
    share = 1
    seconds = 1
    memory_mib = 32
    permitted = (ValueError,)
    actions: tuple[tuple[str, Callable[[], Any]], ...] = (
        ("error: ZeroDivisionError", lambda: 1 // 0),
        ("crash: SIGSEGV", _segfault),
        ("hang: SIGPROF", _spin),
        ("memory", _memory),
        ("forbidden: socket.connect", _catch),
        ("forbidden: opens", lambda: open("../outside", "w")),  # noqa: SIM115
        ("forbidden: os.mkdir", lambda: os.mkdir("/tmp/outside")),
        ("forbidden: os.rename", lambda: os.rename("a", "../b")),
        ("forbidden: subprocess", lambda: subprocess.run(["true"], check=False)),
        ("forbidden: os.system", lambda: os.system("true")),
        ("refused", _deny),
        ("accepted", lambda: Path("inside").write_text("a")),
    )

    def draw(self, rng: Random) -> Any:
        return rng.random()

    def make(self, seed: int, index: int) -> Any:
        return index

    def feed(self, given: Any, folder: Path) -> None:
        if given % 2 == 0:
            self.actions[given // 2][1]()


def test_the_harness_sees_each_kind_of_failure_and_goes_on(tmp_path: Path) -> None:
    number = 2 * len(Hostile.actions)
    batch: Batch = run_tasks(tasks_of(Hostile(tmp_path), 0, number))["hostile"]
    found = {finding.index: f"{finding.kind}: {finding.what}" for finding in batch.findings}
    for at, (expected, _) in enumerate(Hostile.actions):
        if expected in ("refused", "accepted"):
            assert 2 * at not in found
        else:
            assert found.pop(2 * at).startswith(expected)
    assert not found
    assert (batch.inputs, batch.refused, batch.accepted) == (number, 1, number // 2 + 1)
    assert batch.errors == {"ValueError": 1}
    assert not Path("/tmp/outside").exists()


def test_a_process_that_waits_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Hostile):
        actions = (("hang", lambda: time.sleep(100)),)

    monkeypatch.setattr("tools.fuzz.running.WALL_SECONDS", 3)
    batch = run_tasks(tasks_of(Waiting(tmp_path), 0, 2))["hostile"]
    assert [(finding.kind, finding.index) for finding in batch.findings] == [("hang", 0)]
    assert batch.inputs == 2


def test_the_command_writes_counts_and_repeats_an_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fuzz.json"
    words = ["group-names", "neighbor-files", "--inputs", "60", "--processes", "2", "--json", str(file)]
    code = main(words)
    record = json.loads(file.read_text())
    assert code == bool(record["findings"])
    assert record["inputs"] == sum(row["inputs"] for row in record["targets"].values()) == 60
    assert set(record["targets"]) == {"group-names", "neighbor-files"}
    assert record["environment"]["commit"]
    assert main(["group-names", "--index", "7", "--save", str(tmp_path / "input")]) in (0, 1)
    assert (tmp_path / "input").stat().st_size
    assert capsys.readouterr().out.splitlines()[-1].startswith(("refused: ", "accepted"))
