"""What a result file of accuracies holds: every stage, its time, and no path."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from containers import encoded
from images import varied

from benchmarks import accuracy
from tools.docs.benchmarks import render

WORDS = (
    "data.source=folder",
    "model.width=0.25",
    "pretext.epochs=1",
    "clustering.n_clusters=2",
    "clustering.epochs=1",
    "mining.k=3",
    "selflabel=null",
    "evaluation.baselines=false",
    "evaluation.map=false",
    "runtime.threads=1",
)


def test_the_result_has_the_time_of_each_stage_and_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, file = tmp_path / "somewhere", tmp_path / "result.json"
    for number, image in enumerate(varied(40, 8, 8).numpy()):
        folder = root / ("train" if number < 30 else "test") / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encoded(image))
    options = ["--config", "digits", "--seeds", "4", "5", "--device", "cpu", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["accuracy", *options, *WORDS, f"data.root={root}"])
    accuracy.main()
    assert str(root) not in file.read_text()
    content = json.loads(file.read_text())
    assert content["config"]["data"]["root"] == "FOLDER"
    results = content["results"]
    stages = [results[f"{stage} seconds"]["values"] for stage in ("pretext", "mining", "clustering")]
    assert [sum(seconds) for seconds in zip(*stages, strict=True)] == pytest.approx(
        results["seconds"]["values"], abs=0.002
    )
    assert "selflabel seconds" not in results
    assert len(results["clustering test acc"]["values"]) == 2
    assert [entry["stage"] for entry in content["epochs"]["5"]] == ["pretext", "clustering"]
    assert content["epochs"]["5"][0]["knn_acc"] == results["pretext knn_acc"]["values"][1]
    # The page shows the epochs of one run, not of several.
    assert "| 5 | clustering, epoch 1 |" not in render([content | {"file": "result.json"}], {})
    single = {"epochs": {"5": content["epochs"]["5"]}, "file": "result.json"}
    assert "| 5 | clustering, epoch 1 |" in render([content | single], {})
