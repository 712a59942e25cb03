"""Threads, versions and machine are noted at the start; a change is said, and noted under the stages it concerns."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from driving import TINY, Death, Process, run_here, summary, without_seconds, write_known

from scan_fast import __version__

WORDS = (*(word for word in TINY if "threads" not in word), "selflabel=null")
CHANGE = "threads: 1 -> 2"


def changes(folder: Path) -> dict[str, list[str]]:
    stages = summary(folder)["stages"]
    return {name: entry["environment_changed"] for name, entry in stages.items() if "environment_changed" in entry}


def test_other_threads_are_said_and_noted_by_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here("pretext", "digits", *WORDS, "runtime.threads=1", "--out", out).code == 0
    facts = json.loads((out / "environment.json").read_text())["facts"]
    assert facts["threads"] == 1 and facts["torch"] == torch.__version__ and facts["scan-fast"] == __version__
    assert facts["device"] == "cpu" and facts["processes"] == 1 and len(facts["source"]) == 12
    before = summary(out)["stages"]["pretext"]
    result = run_here("mine", out, "runtime.threads=2")
    assert result.code == 0
    said = [line for line in result.out.splitlines() if "environment changed" in line]
    assert len(said) == 1 and f"environment changed: {CHANGE}; results may differ" in said[0]
    result = run_here("cluster", out, "runtime.threads=1")
    assert result.code == 0 and "environment changed" not in result.out
    assert changes(out) == {"mining": [CHANGE]}
    assert summary(out)["stages"]["pretext"] == before
    # A run that is repeated as a whole begins with what there is.
    assert run_here("run", out, "--again", "--quiet", "runtime.threads=2").code == 0
    assert changes(out) == {} and json.loads((out / "environment.json").read_text())["facts"]["threads"] == 2


def test_a_stage_that_went_on_under_another_environment(tmp_path: Path) -> None:
    words = ("run", "digits", *WORDS, "runtime.checkpoint_seconds=0", "--out", tmp_path / "out", "--quiet")
    for threads, at in ((1, 1), (2, 2)):
        death = Death(at, name="pretext.pt")
        killed = Process(*words, f"runtime.threads={threads}", log=tmp_path / "log", death=death).result()
        assert killed.code == -signal.SIGKILL, killed.err
    assert run_here(*words, "runtime.threads=1").code == 0
    assert changes(tmp_path / "out") == {"pretext": [CHANGE]}


def test_the_default_number_of_threads_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_here("pretext", "digits", *WORDS, "--out", first, "--quiet").code == 0
    threads = torch.get_num_threads()
    assert json.loads((first / "environment.json").read_text())["facts"]["threads"] == threads
    assert run_here("pretext", "digits", *WORDS, f"runtime.threads={threads}", "--out", second, "--quiet").code == 0
    assert without_seconds(summary(first)) == without_seconds(summary(second))


def test_a_record_of_anything_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here("pretext", "digits", *WORDS, "--out", out, "--quiet").code == 0
    for content, message in (("{}", "must hold facts"), ('{"facts": {}, "changes": [1]}', "changes, a list of texts")):
        write_known(out, "environment.json", content)
        assert message in run_here("mine", out, "--quiet").refusal()
