"""A model or a run folder that came from somebody else: commands that apply it run nothing of it and ask no server."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from driving import contents, run_here, save_sealed, write_known
from hostile_files import Marker

from scan_fast.estimator import ImageClusterer
from scan_fast.runs.artifacts import CLUSTER_MODEL, MODEL, NEIGHBORS
from scan_fast.runs.digests import seal


@pytest.fixture
def foreign(finished_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run that may be changed."""
    return Path(shutil.copytree(finished_run, tmp_path / "foreign"))


def change(path: Path, **changes: Any) -> None:
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        content[name] = {**content[name], **value} if isinstance(value, dict) else value
    save_sealed(content, path)


def test_settings_that_name_weights_are_not_followed(foreign: Path, images: Path, no_network: None) -> None:
    plain = run_here("predict", foreign, "--data", images).out
    marker = foreign.parent / "executed"
    torch.save({"conv1.weight": Marker(marker)}, foreign.parent / "weights.pth")
    change(foreign / MODEL.name, model={"weights": str(foreign.parent / "weights.pth")})
    config = yaml.safe_load((foreign / "config.yaml").read_text())
    config["model"] |= {"backbone": "resnet18-imagenet", "pretrained": True, "width": 1.0}
    write_known(foreign, "config.yaml", yaml.safe_dump(config))
    assert run_here("predict", foreign, "--data", images).out == plain
    for command in (
        ["embed", foreign, "--data", images, "--out", "features.npz"],
        ["export", foreign / MODEL.name, "--out", "model.pt2"],
        ["compare", foreign],
        ["report", foreign],
        ["name", foreign, 0, "first"],
    ):
        result = run_here(*command)
        assert (result.code, result.err) == (0, ""), result.err
    clusterer = ImageClusterer.load(foreign)
    assert pickle.loads(pickle.dumps(clusterer)).n_clusters_ == clusterer.n_clusters_
    assert not marker.exists()


def test_files_with_code_are_refused_without_advice_to_run_it(foreign: Path, images: Path) -> None:
    marker = foreign.parent / "executed"
    for name in (MODEL.name, CLUSTER_MODEL.name):
        save_sealed({"format": 1, "model": Marker(marker)}, foreign / name)
    for command in (
        ["predict", foreign, "--data", images],
        ["embed", foreign, "--data", images, "--out", "features.npz"],
        ["export", foreign, "--out", "model.pt2"],
        ["export", foreign / MODEL.name, "--format", "reference", "--out", "model.pth.tar"],
        ["evaluate", foreign, "--data", images],
        ["predict", foreign / MODEL.name, "--data", images, "--config", "cifar10"],
        ["selflabel", foreign, "--again", "--quiet"],
    ):
        line = run_here(*command).refusal()
        assert "holds more than tensors and plain values (" in line, line
        assert not any(word in line for word in ("weights_only", "safe_globals", "allowlist", "trust", "pickle"))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "content", "command"),
    [
        (NEIGHBORS.name, {"train": [[10**6]]}, "cluster"),
        (CLUSTER_MODEL.name, {"head": 10**9}, "selflabel"),
        (CLUSTER_MODEL.name, {"head": "0"}, "selflabel"),
        (CLUSTER_MODEL.name, {"model": {"cluster_head.0.bias": torch.zeros(())}}, "selflabel"),
        ("summary.json", {"stages": {"pretext": {"seconds": "x"}}}, "run"),
        ("embeddings.npz", {"train": [1.5]}, "evaluate"),
    ],
)
def test_results_with_values_of_other_kinds_are_one_line(name: str, content: Any, command: str, foreign: Path) -> None:
    path = foreign / name
    if path.suffix == ".json":
        write_known(foreign, name, json.dumps(content))
    elif path.suffix == ".npz":
        import numpy as np

        with np.load(path) as arrays:
            whole = {key: arrays[key] for key in arrays.files}
        np.savez(path, **{**whole, **{key: np.array(value) for key, value in content.items()}})
        with path.open("r+b") as file:
            seal(file)
    else:
        change(path, **content)
    words = {"run": ["--quiet"], "evaluate": []}.get(command, ["--quiet", "--again"])
    line = run_here(command, foreign, *words).refusal()
    assert str(path) in line


def test_folders_of_groups_stay_inside_of_theirs(foreign: Path) -> None:
    names = {"0": "../../outside", "1": "/absolute", "2": "..", "3": "."}
    table = foreign / "assignments.csv"
    from scan_fast.runs.artifacts import ASSIGNMENTS
    from scan_fast.runs.folder import RunFolder

    digest = RunFolder(foreign).read(ASSIGNMENTS).digest
    write_known(foreign, "names.json", json.dumps({"assignments": digest, "names": names}))
    before = set(contents(foreign.parent))
    assert run_here("folders", foreign, "--out", foreign.parent / "groups").code == 0
    made = set(contents(foreign.parent)) - before
    assert table.exists() and made and all(Path(each).parts[0] == "groups" for each in made)
