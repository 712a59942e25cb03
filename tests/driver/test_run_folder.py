"""Runs on folders of images: any layout, size and mode; labels where there are any, and never an influence of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import TINY, TINY_FOLDER, assignments, fill, metrics, picture, results, run_here, summary, tiny_config
from PIL import Image

from scan_fast.data import checking
from scan_fast.data.datasets import open_splits
from scan_fast.data.decode import decode
from scan_fast.errors import RunError
from scan_fast.runs.artifacts import CONFIG, DECODE_CACHE
from scan_fast.runs.csv_files import path_cell
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import MetricsEntry
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.pipeline import run_stages, stages_of
from scan_fast.training.context import open_context

MODES = ("RGB", "L", "RGBA", "P", "CMYK", "1", "LA")
SIZES = ((20, 20), (33, 17), (16, 40), (64, 64))


def mixed(number: int) -> Image.Image:
    return picture(number, MODES[number % len(MODES)], SIZES[number % len(SIZES)])


def png(number: int) -> Image.Image:
    return picture(number, ("RGB", "L", "RGBA", "P")[number % 4], SIZES[number % len(SIZES)])


def fill_mixed(folder: Path, count: int, first: int = 0) -> None:
    """Write images of mixed modes and sizes, each in a format that can hold it."""
    folder.mkdir(parents=True)
    for number in range(first, first + count):
        image = mixed(number)
        ending = {"CMYK": "jpg", "L": "jpg", "P": "gif", "1": "bmp"}.get(image.mode, "png")
        image.save(folder / f"{number:03d}.{ending}")


def every_third(make: Callable[[int], Image.Image], first: int) -> Callable[[int], Image.Image]:
    """Return a function that makes image ``first``, ``first + 3``, ... for 0, 1, ..."""
    return lambda number: make(3 * number + first)


def run(images: Path, *words: object) -> Path:
    result = run_here(
        "run",
        "--data",
        images,
        "--clusters",
        3,
        "--out",
        "out",
        "--quiet",
        *TINY_FOLDER,
        "data.test_fraction=0.2",
        *words,
    )
    assert result.code == 0, result.err
    return Path("out")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def check_summary(folder: Path, labelled: bool) -> None:
    content = summary(folder)
    assert set(content) == {"seed", "stages", "seconds", "baselines", "backbone", "images"}
    assert content["backbone"]["weights"] is None and content["backbone"]["multiply_adds"] > 0
    network = content["backbone"]["network"]
    assert network != "auto" and network in (folder / "report.html").read_text()
    assert content["seed"] == 0
    stages = content["stages"]
    assert list(stages) == ["pretext", "mining", "clustering", "selflabel"]
    assert content["seconds"] == pytest.approx(sum(entry["seconds"] for entry in stages.values()), abs=2e-3)
    assert ("knn_acc" in stages["pretext"]) == labelled
    assert ("purity" in stages["mining"]) == ("test_purity" in stages["mining"]) == labelled
    for name in ("clustering", "selflabel"):
        for split in ("train", "test"):
            found = stages[name][split]
            assert 1 <= found["clusters_used"] <= 3
            assert 1 / 3 <= found["confidence"] <= 1
            for key in ("acc", "nmi", "ari"):
                assert (key in found) == labelled
    assert stages["clustering"]["head"] in (0, 1)
    assert set(content["baselines"]) == ({"kmeans_pixels", "kmeans_features"} if labelled else set())
    assert (folder / "confusion.csv").exists() == labelled
    labels = ("acc", "nmi", "ari", "knn_acc", "purity", "test_purity")
    assert any(key in entry for entry in metrics(folder) for key in labels) == labelled


def check_assignments(folder: Path, expected: set[str], labelled: bool) -> None:
    rows = assignments(folder)
    assert len(rows) == len(expected)
    assert {row["path"] for row in rows} == expected
    assert set(rows[0]) == {"path", "cluster", "confidence", "margin", "split"} | ({"label"} if labelled else set())
    for row in rows:
        assert int(row["cluster"]) in range(3)
        assert 1 / 3 <= float(row["confidence"]) <= 1
        assert 0 <= float(row["margin"]) <= float(row["confidence"])
    # The rows are those of embeddings.npz and neighbors.npz, split by split.
    with np.load(folder / "embeddings.npz") as embeddings, np.load(folder / "neighbors.npz") as neighbors:
        for split in ("train", "test"):
            count = sum(row["split"] == split for row in rows)
            assert len(embeddings[split]) == len(neighbors[split]) == count
            np.testing.assert_allclose(np.linalg.norm(embeddings[split], axis=1), 1, atol=1e-5)


def test_flat_folder_without_labels(tmp_path: Path) -> None:
    fill_mixed(tmp_path / "images", 42)
    folder = run(tmp_path / "images")
    check_summary(folder, labelled=False)
    check_assignments(folder, files(tmp_path / "images"), labelled=False)


def test_class_folders(tmp_path: Path) -> None:
    for kind, name in enumerate(("waves", "bars", "slopes")):
        fill(tmp_path / "images" / name, 14, make=every_third(png, kind))
    folder = run(tmp_path / "images")
    check_summary(folder, labelled=True)
    check_assignments(folder, files(tmp_path / "images"), labelled=True)
    assert all(row["label"] == row["path"].split("/")[0] for row in assignments(folder))


def test_train_and_test_folders(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("test", 4)):
        for kind, name in enumerate(("a", "b", "c")):
            fill(tmp_path / "images" / split / name, count, make=every_third(picture, kind))
    folder = run(tmp_path / "images")
    check_summary(folder, labelled=True)
    check_assignments(folder, files(tmp_path / "images"), labelled=True)
    assert all(row["split"] == row["path"].split("/")[0] for row in assignments(folder))


def test_train_folder_alone(tmp_path: Path) -> None:
    fill(tmp_path / "images" / "train", 36)
    folder = run(tmp_path / "images")
    check_summary(folder, labelled=False)
    check_assignments(folder, files(tmp_path / "images"), labelled=False)


def test_file_names_of_every_kind(tmp_path: Path) -> None:
    fill(tmp_path / "images", 33)
    names = ["with, comma.png", 'with "quotes".png', "ümläut 写真.png", "new\nline.png"]
    for number, name in enumerate(names):
        picture(number).save(tmp_path / "images" / name)
    shutil.copy(os.fsencode(tmp_path / "images" / "000.png"), os.fsencode(tmp_path / "images") + b"/bad\xff.png")
    folder = run(tmp_path / "images")
    paths = {row["path"] for row in assignments(folder)}
    assert {*map(path_cell, names), r"bad\xff.png"} <= paths
    assert len(paths) == 38
    result = run_here("predict", folder, "--data", tmp_path / "images")
    assert result.code == 0, result.err
    assert r"bad\xff.png" in result.out
    assert run_here("embed", folder, "--data", tmp_path / "images", "--out", "features.npz").code == 0


def test_clusters_default_to_the_classes(tmp_path: Path) -> None:
    for kind, name in enumerate(("a", "b", "c")):
        fill(tmp_path / "images" / name, 12, make=every_third(picture, kind))
    words = ("run", "--data", tmp_path / "images", "--out", "out", "--quiet", *TINY_FOLDER, "data.test_fraction=0.2")
    assert run_here(*words).code == 0
    check_assignments(Path("out"), files(tmp_path / "images"), labelled=True)


def test_overclustering_and_fewer_clusters_than_classes(tmp_path: Path) -> None:
    for kind, name in enumerate(("a", "b", "c")):
        fill(tmp_path / "images" / name, 12, make=every_third(picture, kind))
    for clusters in (2, 7):
        words = (
            "--data",
            tmp_path / "images",
            "--clusters",
            clusters,
            "--out",
            f"out{clusters}",
            "--quiet",
            *TINY_FOLDER,
        )
        result = run_here("run", *words, "data.test_fraction=0.2")
        assert result.code == 0, result.err
        test = summary(Path(f"out{clusters}"))["stages"]["selflabel"]["test"]
        assert ("acc_many_to_one" in test) == (clusters > 3)


def test_images_that_changed_are_noticed(images: Path) -> None:
    words = ("--data", images, "--clusters", 3, "--out", "out", "--quiet", *TINY_FOLDER, "data.test_fraction=0.2")
    assert run_here("pretext", *words).code == 0
    assert run_here("mine", *words).code == 0
    fill(images, 5, first=100)
    message = run_here("cluster", *words).refusal()
    assert "out holds a run on other images: 100.png is new, 101.png is new, 102.png is new and 2 more." in message


# -- labels ------------------------------------------------------------------------------------------------------------


def unlabelled_facts(folder: Path) -> dict[str, Any]:
    """What labels must not influence: all weights, embeddings and neighbours, and the table but for its labels."""
    facts = {k: v for k, v in results(folder).items() if k not in ("metrics.jsonl", "summary.json")}
    facts["assignments.csv"] = [{k: v for k, v in row.items() if k != "label"} for row in assignments(folder)]
    facts["choice"] = {k: summary(folder)["stages"]["clustering"][k] for k in ("head", "epoch", "selection_loss")}
    return facts


def test_labels_influence_nothing_that_is_trained_or_selected(finished_run: Path, tmp_path: Path) -> None:
    config = tiny_config("clustering.n_clusters=10")

    def run_with(name: str, change: Any) -> dict[str, Any]:
        splits = open_splits(config.data)
        change(splits)
        folder = RunFolder.open(tmp_path / name, config)
        with folder:
            context = open_context(config, folder, Tracker(folder, quiet=True), splits)
            run_stages(context, stages_of(context))
        return unlabelled_facts(tmp_path / name)

    def permute(splits: Any) -> None:
        for source in (splits.train, splits.test):
            generator = torch.Generator().manual_seed(1)
            source.labels = source.labels[torch.randperm(len(source), generator=generator)]

    def remove(splits: Any) -> None:
        for source in (splits.train, splits.test):
            source.labels = source.class_names = None

    reference = unlabelled_facts(finished_run)
    assert run_with("permuted", permute) == reference
    assert run_with("none", remove) == reference
    assert summary(tmp_path / "permuted")["stages"]["pretext"] != summary(finished_run)["stages"]["pretext"]
    result = run_here("run", "digits", *TINY, "data.labels=none", "--out", "unlabelled", "--quiet")
    assert result.code == 0, result.err
    assert unlabelled_facts(tmp_path / "unlabelled") == reference


# -- RunFolder ---------------------------------------------------------------------------------------------------------


def test_leftovers_of_a_killed_process_are_no_content(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.abc.tmp").write_text("name: di")
    with RunFolder.open(tmp_path, tiny_config()) as folder:
        assert folder.read(CONFIG) == tiny_config()
        assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".config.yaml", "digests.txt", ".lock"}


def test_the_lock_is_held_and_given_back(tmp_path: Path) -> None:
    first, second = (RunFolder.open(tmp_path / "run", tiny_config()) for _ in range(2))
    with first, pytest.raises(RunError, match="in use by another"):
        second.__enter__()
    with second:
        pass


def test_a_folder_that_another_process_took_meanwhile(tmp_path: Path) -> None:
    first = RunFolder.open(tmp_path / "run", tiny_config())
    second = RunFolder.open(tmp_path / "run", tiny_config("seed=1"))
    with first:
        first.finish_stage("pretext", 1.0, {}, 0)
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        second.__enter__()
    with first:  # the refused one has let go of the lock
        assert first.read(CONFIG).seed == 0


def test_metrics_are_dropped_by_stage_and_epoch(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for stage in ("pretext", "clustering"):
        for epoch in (1, 2, 3):
            folder.append_metrics(MetricsEntry(stage, epoch, 2 * epoch, 0.0, {"loss": 1.5}))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "clust')
    folder.drop_metrics("clustering", 2)
    kept = [(entry["stage"], entry["epoch"]) for entry in metrics(tmp_path)]
    assert kept == [("pretext", 1), ("pretext", 2), ("pretext", 3), ("clustering", 1)]


def test_good_files_are_decoded_once_per_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scan_fast.data.encoded.SETTLED_NS", 0)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(30):
        Image.new("RGB", (12, 10), (8 * i, 0, 0)).save(images / f"{i:02d}.png")
        os.utime(images / f"{i:02d}.png", (1e9, 1e9))
    changes = (f"root={images}", "source=folder", "on_error=skip", "resident=files")
    config = tiny_config(*(f"data.{change}" for change in changes), "clustering.n_clusters=2", "mining.k=2")
    decoded: list[str] = []

    def noted(path: str, **words: Any) -> Any:
        decoded.append(path)
        return decode(path, **words)

    monkeypatch.setattr(checking, "decode", noted)
    for start in range(2):
        folder = RunFolder.open(tmp_path / "run", config)
        with folder:
            open_context(config, folder, Tracker(folder, quiet=True))
        assert len(decoded) == 30, f"start {start}"
    # Nothing has been computed yet, so the folder still takes another configuration.
    assert folder.has(DECODE_CACHE)
    RunFolder.open(tmp_path / "run", tiny_config("clustering.n_clusters=3"))
