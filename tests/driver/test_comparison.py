"""Several runs in one table, and the agreement of their clusters."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driving import run_here

from scan_fast.runs.artifacts import ASSIGNMENTS, CONFIG, SUMMARY
from scan_fast.runs.comparison import compare
from scan_fast.runs.config import find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import Summary
from scan_fast.runs.tables import Assignments


def make_run(path: Path, clusters: Sequence[int], first: int = 0, **test: float) -> RunFolder:
    """Write what a finished run of three clusters leaves of its results; images are numbered from ``first``."""
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.write(CONFIG, load_config(find_config("digits"), ["clustering.n_clusters=3"]))
    stages: dict[str, Any] = {
        "pretext": {"seconds": 5.0, "knn_acc": 0.9},
        "mining": {"seconds": 0.25, "purity": 0.8},
        "clustering": {"seconds": 2.0, "test": {"clusters_used": 3.0, "confidence": 0.75, **test}},
    }
    baselines = {"kmeans_features": {"acc_mean": 0.5, "acc_std": 0.1, "nmi_mean": 0.4, "nmi_std": 0.0}}
    run.write(SUMMARY, Summary(0, stages, baselines))
    n = len(clusters)
    paths = [f"{number}.png" for number in range(first, first + n)]
    ones = np.ones(n)
    run.write(ASSIGNMENTS, Assignments(paths, np.array(clusters), ones, ones, ["train"] * n, None))
    return run


def test_rows_are_stages_and_baselines(tmp_path: Path) -> None:
    found = compare({"a": make_run(tmp_path / "a", [0, 1, 2], acc=0.7, nmi=0.6, ari=0.5, ami=0.55)})
    rows = {row.result: row for row in found.results}
    assert list(rows) == ["pretext", "mining", "clustering", "k-means on features"]
    # The vote of neighbours by their labels is no accuracy of clusters.
    assert (rows["pretext"].acc, rows["pretext"].knn_acc) == (None, 0.9)
    clustering = rows["clustering"]
    assert (clustering.clusters, clustering.used, clustering.confidence, clustering.seconds) == (3, 3, 0.75, 2.0)
    assert (clustering.acc, clustering.nmi, clustering.ari, clustering.ami) == (0.7, 0.6, 0.5, 0.55)
    assert (rows["k-means on features"].acc, rows["k-means on features"].used) == (0.5, None)
    columns, lines = found.table()
    assert columns[5:] == ["ACC", "NMI", "ARI", "AMI", "kNN, by labels", "seconds"]
    assert {len(line) for line in lines} == {len(columns)}
    assert [line[0] for line in lines] == ["a", "", "", ""]
    assert lines[2][1:] == ["clustering", "3", "3", "0.750", "0.700", "0.600", "0.500", "0.550", "", "2.0"]
    assert lines[0][1:] == ["pretext", "", "", "", "", "", "", "", "0.900", "5.0"]


def test_agreement_is_on_the_images_in_both(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", [0, 0, 1, 1, 2, 2])
    renamed = make_run(tmp_path / "b", [1, 1, 2, 2, 0, 0])
    shifted = make_run(tmp_path / "c", [0, 0, 1, 1, 2, 0], first=2)  # shares 2.png .. 5.png
    other = make_run(tmp_path / "d", [0, 1], first=100)
    pairs: dict[tuple[str, str], Any] = {
        (each.first, each.second): (each.images, each.ami)
        for each in compare({"a": first, "b": renamed, "c": shifted, "d": other}).agreements
    }
    assert pairs["a", "b"] == (6, pytest.approx(1.0))
    assert pairs["a", "c"] == (4, pytest.approx(1.0))
    assert pairs["a", "d"] == (0, None)
    assert len(pairs) == 6
    make_run(tmp_path / "e", [0, 1, 0, 1, 0, 1])
    unlike = compare({"a": first, "e": RunFolder(tmp_path / "e")}).agreements[0].ami
    assert unlike is not None and unlike < 0.1


def test_the_command_prints_json_and_csv(finished_run: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, [0, 1, 2], acc=0.7)
    result = run_here("compare", "a", "b", finished_run, "--json", "--csv", "table.csv")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    with Path("table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["run"] for row in table] == [row["run"] for row in found["results"]]
    assert [row["acc"] for row in table if row["result"] == "clustering"][:2] == ["0.7", "0.7"]
    own = json.loads((finished_run / "summary.json").read_text())["stages"]["selflabel"]
    row = next(row for row in found["results"] if row["run"] == str(finished_run) and row["result"] == "selflabel")
    assert (row["clusters"], row["acc"], row["seconds"]) == (10, own["test"]["acc"], own["seconds"])
    assert [(each["images"], each["ami"]) for each in found["agreement"]] == [
        (3, pytest.approx(1.0)),
        (0, None),
        (0, None),
    ]
    text = run_here("compare", "a", "b").out
    assert "agreement (AMI) on the images in both" in text
    assert all(len(set(map(len, block.splitlines()[1:]))) == 1 for block in text.split("agreement"))  # no broken line


def test_unfinished_runs_and_mistakes(finished_run: Path, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "begun")
    run.path.mkdir()
    run.write(CONFIG, load_config(find_config("digits")))
    assert "nothing finished" in run_here("compare", "begun").out
    assert "nowhere is no run folder" in run_here("compare", "begun", "nowhere").refusal()
    assert "each run must be given once, got begun begun" in run_here("compare", "begun", "begun").refusal()
    (run.path / "summary.json").write_text("{")
    assert "summary.json cannot be read" in run_here("compare", "begun").refusal()
