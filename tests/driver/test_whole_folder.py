"""Without a test split every image is trained on and reported, and no word speaks of splits."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import TINY_FOLDER, Death, Process, assignments, fill, picture, results, run_here, summary
from torch.nn import functional as F

from scan_fast import ImageClusterer
from scan_fast.evaluation.metrics import clustering_metrics
from scan_fast.evaluation.model_selection import selection_loss
from scan_fast.evaluation.probes import kmeans_baseline, knn_accuracy
from scan_fast.models.saved import SavedModel
from scan_fast.predictor import Predictor
from scan_fast.runs import artifacts
from scan_fast.runs.config import parse_override
from scan_fast.runs.folder import RunFolder

SPLIT_WORDS = re.compile(r"\b(test|held.out|by split|training images|train (?:acc|nmi|ari|ami|conf|clus)\w*)\b")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images in folders of three classes."""
    root = tmp_path_factory.mktemp("classes")
    for number in range(36):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        picture(number).save(folder / f"{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def labelled(classes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on them."""
    folder = tmp_path_factory.mktemp("labelled") / "run"
    threads = torch.get_num_threads()
    result = run_here("run", "--data", classes, *TINY_FOLDER, "clustering.epochs=3", "--quiet", "--out", folder)
    torch.set_num_threads(threads)
    assert result.code == 0, result.err
    return folder


def words_of(page: str) -> str:
    """Return the text of the report before the configuration, without styles and pictures."""
    body = page[page.index("<body") :]
    body = re.sub(r"<(script|style|svg|pre)\b.*?</\1>", " ", body, flags=re.DOTALL)
    return re.sub(r"<[^>]*>", " ", body)


@pytest.mark.parametrize("fraction", [None, 0.2])
def test_words_of_a_run_without_labels(fraction: float | None, images: Path, tmp_path: Path) -> None:
    held_out = [] if fraction is None else [f"data.test_fraction={fraction}"]
    words = ("run", "--data", images, "--clusters", 3, *TINY_FOLDER, *held_out, "--out", tmp_path / "out")
    result = run_here(*words)
    assert result.code == 0, result.err
    table = result.out.splitlines()
    heading = next(line for line in table if "stage" in line and "seconds" in line)
    assert "ACC" not in heading and "NMI" not in heading and "ARI" not in heading
    again = run_here("evaluate", tmp_path / "out")
    page = words_of((tmp_path / "out" / "report.html").read_text())
    if fraction is None:
        assert any(line.startswith("images: 36 images, 3 clusters") for line in table)
        assert any(line.strip() == "images (images)" for line in table)
        for text in (result.out, again.out, page):
            assert SPLIT_WORDS.findall(text) == []
    else:
        assert any(re.match(r"images: \d+ training and \d+ test images, 3 clusters", line) for line in table)
        assert "images (test images)" in result.out and "by split" in page


def test_words_of_a_run_with_labels(classes: Path, labelled: Path) -> None:
    result = run_here("evaluate", labelled)
    assert "ACC" in result.out and "k-means on features" in result.out
    page = words_of((labelled / "report.html").read_text())
    assert "selflabel" in page and "NMI" in page
    for text in (result.out, page):
        assert SPLIT_WORDS.findall(text) == []


def test_every_image_is_trained_on_and_listed(classes: Path, labelled: Path) -> None:
    rows = assignments(labelled)
    assert {row["path"] for row in rows} == {path.relative_to(classes).as_posix() for path in classes.rglob("*.png")}
    assert {row["split"] for row in rows} == {"train"}
    run = RunFolder(labelled)
    assert list(run.read(artifacts.EMBEDDINGS).rows) == list(run.read(artifacts.NEIGHBORS).index) == ["train"]
    assert run.read(artifacts.NEIGHBORS).index["train"].shape == (36, 3)


def test_metrics_are_of_all_images(labelled: Path) -> None:
    rows = assignments(labelled)
    clusters = np.array([int(row["cluster"]) for row in rows])
    labels = np.array(["abc".index(row["label"]) for row in rows])
    expected = clustering_metrics(clusters, labels, 3, 3)
    entry = summary(labelled)["stages"]["selflabel"]
    assert set(entry) == {"seconds", "epoch", "selection_score", "train"}
    assert {key: entry["train"][key] for key in ("acc", "nmi", "ari")} == {
        key: expected[key] for key in ("acc", "nmi", "ari")
    }
    with (labelled / "confusion.csv").open() as file:
        assert sum(int(cell) for line in list(file)[1:] for cell in line.split(",")[1:]) == 36
    embeddings = RunFolder(labelled).read(artifacts.EMBEDDINGS).rows["train"]
    found = kmeans_baseline(embeddings, embeddings, 3, [0])[0]
    baselines = summary(labelled)["baselines"]["kmeans_features"]
    low, high = (baselines["acc_mean"] + sign * 3 * baselines["acc_std"] + sign * 1e-9 for sign in (-1, 1))
    assert low <= clustering_metrics(found, labels, 3, 3)["acc"] <= high


def test_the_knn_check_leaves_each_image_out(labelled: Path) -> None:
    labels = torch.tensor(["abc".index(row["label"]) for row in assignments(labelled)])
    embeddings = torch.from_numpy(RunFolder(labelled).read(artifacts.EMBEDDINGS).rows["train"])
    config = RunFolder(labelled).read(artifacts.CONFIG).pretext
    expected = knn_accuracy(embeddings, labels, k=config.monitor_k, temperature=config.monitor_temperature)
    assert summary(labelled)["stages"]["pretext"]["knn_acc"] == pytest.approx(expected)


def test_the_head_is_chosen_by_all_images_and_their_nearest_neighbours(
    classes: Path, labelled: Path, tmp_path: Path
) -> None:
    """Among `mining.test_k` neighbours, although `mining.k` are mined to train on."""
    words = (
        "run",
        "--data",
        classes,
        *TINY_FOLDER,
        "selflabel=null",
        "mining.test_k=2",
        "clustering.objective.prior=uniform",
        "--quiet",
        "--out",
        tmp_path / "r",
    )
    assert run_here(*words).code == 0
    run = RunFolder(tmp_path / "r")
    saved: SavedModel = run.read(artifacts.MODEL)
    predictor = Predictor(saved)
    source = predictor.source(str(classes))
    probabilities = predictor.probabilities(source)
    order = [source.paths.index(row["path"]) for row in assignments(tmp_path / "r")]
    neighbors = torch.from_numpy(run.read(artifacts.NEIGHBORS).index["train"][:, :2])
    expected = float(selection_loss(probabilities[order].log()[None], neighbors)[0])
    assert summary(tmp_path / "r")["stages"]["clustering"]["selection_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("words", [[], ["clustering.update=heads"]])
def test_killed_it_goes_on_to_the_same_bits(words: list[str], images: Path, tmp_path: Path) -> None:
    command = ("run", "--data", images, "--clusters", 3, *TINY_FOLDER, *words, "--quiet", "--out")
    assert run_here(*command, tmp_path / "whole").code == 0
    for name in ("pretext-final.pt", "neighbors.npz", "clustering-final.pt", "selflabel-final.pt"):
        killed = Process(*command, tmp_path / "out", log=tmp_path / "log", death=Death(1, name=name)).result()
        assert killed.code == -signal.SIGKILL, killed.err
    assert run_here(*command, tmp_path / "out").code == 0
    assert results(tmp_path / "out") == results(tmp_path / "whole")


def test_a_sweep_names_no_split(classes: Path, tmp_path: Path) -> None:
    result = run_here(
        *("sweep", "folder", f"data.root={classes}", *TINY_FOLDER, "--seeds", "0-1", "--quiet", "--out", tmp_path / "s")
    )
    assert result.code == 0, result.err
    content = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert {"selflabel acc", "kmeans_features acc", "pretext knn_acc", "mining purity"} <= set(content)
    assert not any("test" in name for name in content)


def test_the_estimator_trains_on_every_image() -> None:
    settings = dict(parse_override(word) for word in TINY_FOLDER)
    pixels = np.stack([np.asarray(picture(number)) for number in range(24)])
    model = ImageClusterer(3, settings=settings).fit(pixels)
    assert set(model.summary_["stages"]["selflabel"]) == {"seconds", "epoch", "selection_score", "train"}
    assert len(model.labels_) == 24
    held_out = ImageClusterer(3, settings={**settings, "data.test_fraction": 0.2}).fit(pixels)
    assert "test" in held_out.summary_["stages"]["selflabel"]


def test_a_folder_may_still_bring_its_own_split(tmp_path: Path) -> None:
    fill(tmp_path / "images" / "train", 20)
    fill(tmp_path / "images" / "val", 6, first=50)
    result = run_here("run", "--data", tmp_path / "images", "--clusters", 3, *TINY_FOLDER, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert "\nimages: 20 training and 6 test images" in result.out
    assert "selection_loss" in summary(tmp_path / "out")["stages"]["clustering"]


def test_unit_rows_are_mined(labelled: Path) -> None:
    rows = torch.from_numpy(RunFolder(labelled).read(artifacts.EMBEDDINGS).rows["train"])
    torch.testing.assert_close(F.normalize(rows, dim=1), rows)
