"""A run on one's own images: what it starts from, frozen features, a suggested number, minutes, and an early end."""

from __future__ import annotations

import csv
import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import TINY, TINY_FOLDER, Death, Process, accept_files, fill, run_here
from PIL import Image

from scan_fast.models.backbones import ModelConfig, build_backbone
from scan_fast.planning import Estimate, choose_start, duration

COLORS = ((220, 40, 40), (40, 200, 60), (50, 60, 220), (230, 210, 40))
SIZES = (30, 14, 9, 7)


@pytest.fixture
def colored(tmp_path: Path) -> Path:
    """A flat folder with four uneven groups of images: one color each, with noise."""
    folder = tmp_path / "colored"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for group, (color, size) in enumerate(zip(COLORS, SIZES, strict=True)):
        for number in range(size):
            pixels = np.array(color) + rng.integers(-30, 30, (24, 24, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{group}-{number:02d}.png")
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A weight file of a small network; even random weights tell colors apart."""
    torch.manual_seed(0)
    file = tmp_path / "weights.pth"
    torch.save(build_backbone(ModelConfig(backbone="resnet_digits", width=0.5)).state_dict(), file)
    return file


def frozen(colored: Path, weights: Path, out: Path, *words: object) -> list[object]:
    network = ("model.backbone=resnet_digits", "model.width=0.5", f"model.weights={weights}")
    small = ("data.image_size=16", "mining.k=5", "runtime.threads=1", "evaluation.map=false")
    return ["run", "--data", colored, "--out", out, *network, *small, *words]


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


def groups(folder: Path) -> dict[str, str]:
    with (folder / "assignments.csv").open() as file:
        return {Path(row["path"]).name: row["cluster"] for row in csv.DictReader(file)}


# -- frozen features ---------------------------------------------------------------------------------------------------


def test_a_weight_file_means_that_nothing_is_trained(colored: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_here(*frozen(colored, weights, out, "--clusters", 4))
    assert result.code == 0, result.err
    stages = summary(out)["stages"]
    assert list(stages) == ["pretext", "mining", "clustering"]
    choice = stages["clustering"]["choice"]
    candidates = {entry["name"]: entry["score"] for entry in choice["candidates"]}
    assert {"kmeans", "merging"} <= candidates.keys()
    assert choice["score"] >= candidates["kmeans"]
    assert choice["method"] in candidates
    assert str(len(candidates) - 6) in choice["reason"]  # six heads beside the partitions
    found = groups(out)
    assert len(found) == sum(SIZES)
    for group in range(len(SIZES)):
        assert len({cluster for name, cluster in found.items() if name.startswith(f"{group}-")}) == 1
    assert len(set(found.values())) == len(SIZES)


def test_the_model_of_frozen_features_assigns_as_the_run_did(colored: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run_here(*frozen(colored, weights, out, "--clusters", 4)).code == 0
    weights.unlink()  # the model needs it no more
    predicted = run_here("predict", out, "--data", colored)
    assert predicted.code == 0, predicted.err
    rows = {Path(row["path"]).name: row for row in csv.DictReader(predicted.out.splitlines())}
    assert {name: row["cluster"] for name, row in rows.items()} == groups(out)
    assert sum(int(row["unlike"]) for row in rows.values()) <= 4
    again = run_here("cluster", out, "--again", "clustering.n_clusters=3", "--quiet")
    assert again.code == 0, again.err
    assert len(set(groups(out).values())) == 3


def test_another_run_on_the_same_images_starts_at_the_heads(colored: Path, weights: Path, tmp_path: Path) -> None:
    first, second, other = (tmp_path / "runs" / name for name in ("first", "second", "other"))
    assert run_here(*frozen(colored, weights, first, "--clusters", 4)).code == 0
    result = run_here(*frozen(colored, weights, second, "--clusters", 3))
    assert f"features: {first / 'embeddings.npz'} holds those of these images by this network" in result.out
    assert (second / "embeddings.npz").read_bytes() == (first / "embeddings.npz").read_bytes()
    same = run_here(*frozen(colored, weights, tmp_path / "runs" / "same", "--clusters", 4))
    assert same.code == 0
    assert groups(tmp_path / "runs" / "same") == groups(first)
    # Another image, and the features are others.
    Image.new("RGB", (24, 24), (1, 2, 3)).save(colored / "0-00.png")
    result = run_here(*frozen(colored, weights, other, "--clusters", 3))
    assert "holds those of these images" not in result.out
    # Neither do images of another size.
    result = run_here(*frozen(colored, weights, tmp_path / "runs" / "size", "--clusters", 3, "data.image_size=24"))
    assert "holds those of these images" not in result.out


def test_ways_and_refinements_can_be_named(colored: Path, weights: Path, tmp_path: Path) -> None:
    words = frozen(colored, weights, tmp_path / "out", "--clusters", 4)
    given = "clustering.objective={kind: scan, entropy_weight: 2.0, prior: [30, 14, 9, 7]}"
    assert (
        run_here(*words, "preset=pretrained", "clustering.ways=[ward]", "clustering.refinements=[scan]", given).code
        == 0
    )
    names = [entry["name"] for entry in summary(tmp_path / "out")["stages"]["clustering"]["choice"]["candidates"]]
    assert {name.split(" ")[0] for name in names} == {"scan", "ward", "kmeans"}
    message = run_here(
        *frozen(colored, weights, tmp_path / "no", "clustering.ways=[wards]", "preset=pretrained")
    ).refusal()
    assert "clustering.ways: ways must be among kmeans, smoothed-kmeans" in message


# -- the number of groups ----------------------------------------------------------------------------------------------


def test_the_number_is_suggested_and_used(colored: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_here(*frozen(colored, weights, out, "--clusters", "auto"))
    assert result.code == 0, result.err
    found = summary(out)["stages"]["number"]
    assert found["k"] == 4
    assert len(set(groups(out).values())) == 4
    assert "Suggested number of groups: 4" in (out / "report.html").read_text()
    # Without a word, as there are no classes.
    assert run_here(*frozen(colored, weights, tmp_path / "none")).code == 0
    assert summary(tmp_path / "none")["stages"]["number"]["k"] == 4


def test_suggest_k_of_a_folder_and_of_a_run(colored: Path, weights: Path, tmp_path: Path) -> None:
    words = frozen(colored, weights, tmp_path / "out")[1:]
    result = run_here("suggest-k", *words)
    assert result.code == 0, result.err
    assert result.out.splitlines()[-1].startswith("suggested: 4 groups; scan-fast run --data ")
    assert result.out.splitlines()[-1].endswith(" --clusters 4 makes them")
    assert run_here(*frozen(colored, weights, tmp_path / "three", "--clusters", 3)).code == 0
    found = json.loads(run_here("suggest-k", tmp_path / "three", "--json", "--quiet").out)
    assert found["k"] == 4
    assert {"k", "score", "stability", "way"} == set(found["curve"][0])
    assert len(set(groups(tmp_path / "three").values())) == 3
    again = f"scan-fast cluster {tmp_path / 'three'} --again --clusters 4"
    assert again in run_here("suggest-k", tmp_path / "three", "--quiet").out
    assert run_here(*again.split()[1:], "--quiet").code == 0
    assert len(set(groups(tmp_path / "three").values())) == 4
    assert "leave --clusters out" in run_here("suggest-k", *words, "--clusters", 3).refusal()


# -- the start ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without weights and without a network; the folder is that of torch's checkpoints."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_on_this_machine_are_taken(alone: Path) -> None:
    from torchvision.models import ResNet50_Weights

    for device, preset, text in (("cpu", "descriptor", "edges and colours"), ("cuda", "fast", "training from scratch")):
        start = choose_start([], {}, device)
        assert start is not None
        assert start.settings == {"preset": preset}
        assert start.text.startswith(text) and "no weights of a pretrained network are on this machine" in start.text
    (alone / Path(ResNet50_Weights.DEFAULT.url).name).write_bytes(b"weights")
    start = choose_start([], {}, "cpu")
    assert start is not None
    assert start.settings["model.backbone"] == "torchvision:resnet50"
    assert start.settings["preset"] == "pretrained"
    assert "on this machine" in start.text


@pytest.mark.parametrize(
    ("given", "model", "preset"),
    [
        (["preset"], {}, None),
        (["pretext.epochs"], {}, None),
        (["model.backbone"], {"backbone": "resnet18_cifar"}, None),
        (["model.backbone"], {"backbone": "dinov2-small"}, "pretrained"),
        (["model.backbone"], {"backbone": "descriptor"}, "descriptor"),
        (["model.backbone", "pretext.epochs"], {"backbone": "descriptor"}, None),
        (["model.backbone", "model.weights"], {"backbone": "timm:resnet18", "weights": "x.pth"}, "pretrained"),
        (["model.backbone", "model.weights", "pretext.epochs"], {"backbone": "resnet50", "weights": "x.pth"}, None),
    ],
)
def test_the_command_line_decides_first(given: list[str], model: dict[str, Any], preset: str | None) -> None:
    start = choose_start(given, model, "cpu")
    assert (None if start is None else start.settings.get("preset")) == preset


def test_without_weights_edges_and_colors_are_grouped(alone: Path, colored: Path, tmp_path: Path) -> None:
    result = run_here("run", "--data", colored, "--clusters", 4, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "edges and colours are compared, and nothing is trained: no weights of a pretrained network" in result.out
    assert "preset=fast trains a network" in result.out
    found = groups(tmp_path / "out")
    assert len(set(found.values())) == 4
    by_color = {(Path(path).name[0], group) for path, group in found.items()}
    assert len(by_color) == 4


def test_a_descriptor_is_not_trained(alone: Path, colored: Path, tmp_path: Path) -> None:
    words = ["run", "--data", colored, "--clusters", 4, "--out", tmp_path / "out", "model.backbone=descriptor"]
    message = run_here(*words, "pretext.epochs=3").refusal()
    assert "model.backbone=descriptor has nothing to train: set pretext.method=none" in message
    assert "backbone 'descriptor' has no weights" in run_here(*words, "model.weights=x.pth").refusal()


# -- time --------------------------------------------------------------------------------------------------------------


def test_minutes_fit_the_epochs_and_the_run_goes_on_as_fitted(tmp_path: Path) -> None:
    fill(tmp_path / "photos", 40)
    words = [
        word for word in TINY_FOLDER if not word.startswith(("pretext.epochs", "clustering.epochs", "selflabel.epochs"))
    ]
    command = [
        "run",
        "--data",
        tmp_path / "photos",
        "--clusters",
        3,
        "--out",
        tmp_path / "out",
        *words,
        "pretext.epochs=5000",
    ]
    result = run_here(*command, "--minutes", 0.05)
    assert result.code == 0, result.err
    assert "for 0.05 minutes: " in result.out
    text = (tmp_path / "out" / "config.yaml").read_text()
    assert 1 <= int(re.findall(r"epochs: (\d+)", text)[0]) < 5000
    again = run_here(*command, "--minutes", 3)
    assert again.code == 0, again.err
    assert (tmp_path / "out" / "config.yaml").read_text() == text
    assert (
        "--minutes: must be a number of minutes above 0, got 'soon'"
        in run_here(*command, "--minutes", "soon").refusal()
    )


def test_too_few_minutes_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "photos", 40)
    words = ["run", "--data", tmp_path / "photos", "--clusters", 3, *TINY_FOLDER, "--out", tmp_path / "out"]
    message = run_here(*words, "--minutes", 1e-7).refusal()
    assert "is too short for 40 images: one pass of each stage takes about" in message
    assert message.endswith("; give more minutes, or use pretrained features (preset=pretrained)")
    # Digits have no such preset, and neither has a configuration without presets, or that of another run.
    Path("own.yaml").write_text("{data: {source: digits}, pretext: {method: simclr}, clustering: {objective: scan}}")
    Path("begun").mkdir()
    Path("begun/config.yaml").write_text(Path("own.yaml").read_text())
    accept_files(Path("begun"))
    for config in ("digits", "own.yaml", "begun"):
        message = run_here("run", config, *TINY, "--out", tmp_path / "out", "--minutes", 1e-7).refusal()
        assert message.endswith("; give more minutes"), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (99, "99 s"), (125, "2 min"), (3599, "60 min"), (7500, "2 h 05 min")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert duration(seconds) == ("1 h 00 min" if text == "60 min" else text)


def test_an_estimate_names_the_stages() -> None:
    assert (
        str(Estimate({"pretext": 7200.0, "clustering": 600.0}))
        == "about 2 h 10 min (pretext 2 h 00 min, clustering 10 min)"
    )
    assert str(Estimate({"pretext": 90.0, "clustering": 0.0})) == "about 90 s"


# -- an early end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pretext.pt", "clustering.pt", "selflabel.pt"])
def test_finish_groups_by_what_was_learned_and_the_run_goes_on(name: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["run", "digits", *TINY, "runtime.checkpoint_seconds=0", "--out", run, "--quiet"]
    result = Process(*words, log=tmp_path / "log", death=Death(2, name=name, signal=signal.SIGINT)).result()
    assert result.code == 130
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    early = run_here("run", run, "--finish", "--quiet")
    assert early.code == 0, early.err
    beside = tmp_path / "run-so-far"
    for file in ("assignments.csv", "report.html", "model.pt"):
        assert (beside / file).is_file()
    stages = summary(beside)["stages"]
    assert ("choice" in stages["clustering"]) == (name == "pretext.pt")
    assert "selflabel" not in stages
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    assert run_here("run", run, "--finish", "--quiet").code == 0  # again, in place of the former
    assert run_here(*words).code == 0
    assert "is finished" in run_here("run", run, "--finish").refusal()


def test_nothing_learned_yet_cannot_be_finished(tmp_path: Path) -> None:
    assert "is no run folder" in run_here("run", tmp_path, "--finish").refusal()
