"""Whole runs on images in containers by the command line: configuration, assignments, skipped images, resuming."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from containers import CONTAINERS, Item, encoded, write_folder
from driving import TINY_FOLDER, Death, Process, assignments, picture, results, run_here, summary

pytest.importorskip("datasets")
pytest.importorskip("pyarrow")

OPTIONS = (*TINY_FOLDER, "--clusters", "3", "--quiet")


def items(n: int = 36, broken: tuple[int, ...] = ()) -> list[Item]:
    images = [encoded(np.array(picture(i)), "PNG") for i in range(n)]
    return [
        Item(f"{i:03d}", b"broken" if i in broken else data, "abc"[i % 3], "train" if i % 4 else "test", "png")
        for i, data in enumerate(images)
    ]


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=list(CONTAINERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_a_run_of_each_kind(tmp_path: Path, kind: str) -> None:
    """Relative paths are made absolute; streamed and resident images give the same bits; new images are assigned."""
    CONTAINERS[kind](tmp_path / "set", items())
    for resident in ("host", "files"):
        out = tmp_path / resident
        result = run_here("run", "--data", f"{kind}:set", *OPTIONS, f"data.resident={resident}", "--out", out)
        assert result.code == 0, result.err
    assert results(tmp_path / "files") == results(tmp_path / "host")
    assert str(tmp_path / "set") in (tmp_path / "host" / "config.yaml").read_text()
    rows = assignments(tmp_path / "host")
    assert sorted(row["split"] for row in rows) == ["test"] * 9 + ["train"] * 27
    assert "acc" in summary(tmp_path / "host")["stages"]["selflabel"]["test"]
    result = run_here("predict", tmp_path / "host", "--data", f"{kind}:set")
    assert result.code == 0, result.err
    predicted = {row["path"]: row["cluster"] for row in csv.DictReader(result.out.splitlines())}
    assert predicted == {row["path"]: row["cluster"] for row in rows}


def test_the_results_are_those_of_a_folder(tmp_path: Path, kind: str) -> None:
    """Only the names of the images differ, and the digest that includes them."""
    source = CONTAINERS[kind](tmp_path / "set", items())
    unlike = ("assignments.csv", "summary.json", "metrics.jsonl", "embeddings.npz.images", "neighbors.npz.images")
    found: list[dict[str, Any]] = []
    for data in (source, write_folder(tmp_path / "photos", [item._replace(label=None) for item in items()])):
        out = tmp_path / f"run{len(found)}"
        result = run_here("run", "--data", data, *OPTIONS, "data.labels=none", "--out", out)
        assert result.code == 0, result.err
        found.append({name: value for name, value in results(out).items() if not name.startswith(unlike)})
    assert found[0].keys() == found[1].keys()
    assert {name for name in found[0] if found[0][name] != found[1][name]} == set()


def test_an_interrupted_run_continues(tmp_path: Path, kind: str) -> None:
    source = CONTAINERS[kind](tmp_path / "set", items(broken=(5, 9)))
    words = ("run", "--data", source, *OPTIONS, "data.on_error=skip", "data.crop=file", "--out")
    assert run_here(*words, tmp_path / "whole").code == 0
    killed = Process(*words, tmp_path / "run", log=tmp_path / "log", death=Death(at=1, name="neighbors.npz")).result()
    assert killed.code == -9, killed.err
    result = run_here(*words, tmp_path / "run")
    assert result.code == 0, result.err
    assert results(tmp_path / "run") == results(tmp_path / "whole")
    with (tmp_path / "run" / "skipped.csv").open(newline="") as file:
        assert len(list(csv.reader(file))) == 3


def test_wrong_sources_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "did you mean webdataset:SHARDS?" in run_here("run", "digits", "data.source=webdatasets:x").refusal()
    missing = run_here("run", "--data", "parquet:nothing/*.parquet", "--clusters", "2").refusal()
    assert f"{tmp_path}/nothing/*.parquet matches no file" in missing
