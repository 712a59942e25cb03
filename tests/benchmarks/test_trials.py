"""Trials of recipes: shared stages are done once, results are kept and continued, the page shows what the files say."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, trials
from scan_fast.stages.pipeline import run_stage

SHORT = ["pretext.epochs=1", "clustering.epochs=1", "clustering.heads=1", "selflabel.epochs=1", "mining.k=3"]


def run(monkeypatch: pytest.MonkeyPatch, file: Path, *words: str, until: str = "clustering") -> None:
    options = ["trials", "--set", *SHORT, "--until", until, "--json", str(file), *words]
    monkeypatch.setattr("sys.argv", options)
    trials.main()


def test_shared_stages_are_done_once_and_files_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(context: Any, stage: Any, handover: Any) -> None:
        done.append(stage.name)
        run_stage(context, stage, handover)

    monkeypatch.setattr(trials, "run_stage", counted)
    file = tmp_path / "result.json"
    both = ("--seeds", "0", "--", "base", "random: clustering.initialize=random")
    run(monkeypatch, file, *both)
    assert done == ["pretext", "mining", "clustering", "clustering"]
    result = json.loads(file.read_text())
    base, other = (result["trials"][name]["seeds"]["0"] for name in ("base", "random"))
    assert base["pretext"] == other["pretext"] and base["mining"] == other["mining"]
    assert base["clustering"] != other["clustering"]
    assert all(figures["cpu_seconds"] > 0 for stage, figures in base.items() if stage != "mining")
    run(monkeypatch, file, *both)
    assert len(done) == 4
    run(monkeypatch, file, "--seeds", "1", "--", "base")
    assert sorted(json.loads(file.read_text())["trials"]["base"]["seeds"]) == ["0", "1"]
    with pytest.raises(SystemExit):
        run(monkeypatch, file, "--seeds", "0", "--", "base: mining.k=4")
    with pytest.raises(SystemExit):
        run(monkeypatch, file, "--config", "cifar10", "--seeds", "0", "--", "base")


def test_the_table_has_means_and_deviations(tmp_path: Path) -> None:
    seeds = {
        str(s): {"pretext": {"knn_acc": 0.9 + s / 100, "cpu_seconds": 10.4 + s}, "mining": {"purity": 0.5}}
        for s in (0, 2)
    }
    result = {
        "config": "digits",
        "set": ["mining.k=3"],
        "environment": {"device": "a processor", "commit": "0123456789abcdef"},
        "trials": {"base": {"changes": [], "seeds": seeds}, "more": {"changes": ["a.b=1"], "seeds": {"0": seeds["0"]}}},
    }
    (tmp_path / "t.json").write_text(json.dumps(result))
    page = report.fill("before\n<!-- trials: t.json -->\nold\n<!-- end -->\nafter\n", tmp_path)
    assert "| trial | changes | seeds | kNN | pretext, s | purity |" in page
    assert "| base |  | 2 | 91.0 ± 1.4 | 11 | 50.0 ± 0.0 |" in page
    assert "| more | `a.b=1` | 1 | 90.0 | 10 | 50.0 |" in page
    assert "a processor, commit `0123456789ab`; configuration `digits` with `mining.k=3`" in page
    assert "old" not in page and page.startswith("before\n") and page.endswith("<!-- end -->\nafter\n")
    assert report.fill(page, tmp_path) == page


def test_the_committed_tables_show_the_committed_trials() -> None:
    text = report.RECIPES.read_text()
    assert report.fill(text, report.RESULTS) == text
