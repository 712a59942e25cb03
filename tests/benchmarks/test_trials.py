"""Trials of recipes: shared stages run once, results are kept and continued."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.trials import command, running
from scan_fast.stages.pipeline import run_stage

SHORT = ["pretext.epochs=1", "clustering.epochs=1", "clustering.heads=1", "selflabel.epochs=1", "mining.k=3"]


def run(file: Path, *words: str, until: str = "clustering") -> int:
    return command.main(["--set", *SHORT, "--until", until, "--json", str(file), *words])


def test_shared_stages_are_done_once_and_files_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(context: Any, stage: Any, handover: Any) -> None:
        done.append(stage.name)
        run_stage(context, stage, handover)

    monkeypatch.setattr(running, "run_stage", counted)
    file = tmp_path / "result.json"
    both = ("--seeds", "0", "--", "base", "random: clustering.initialize=random")
    assert run(file, *both) == 0
    assert done == ["pretext", "mining", "clustering", "clustering"]
    result = json.loads(file.read_text())
    base, other = (result["trials"][name]["seeds"]["0"] for name in ("base", "random"))
    assert base["pretext"] == other["pretext"] and base["mining"] == other["mining"]
    assert base["clustering"] != other["clustering"]
    assert all(figures["cpu_seconds"] > 0 for stage, figures in base.items() if stage != "mining")
    assert run(file, *both) == 0
    assert len(done) == 4
    assert run(file, "--seeds", "1", "--", "base") == 0
    assert sorted(json.loads(file.read_text())["trials"]["base"]["seeds"]) == ["0", "1"]
    assert run(file, "--seeds", "0", "--", "base: mining.k=4") == 2
    assert run(file, "--config", "cifar10", "--seeds", "0", "--", "base") == 2
