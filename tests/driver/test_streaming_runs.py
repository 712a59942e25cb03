"""Runs whose images stay in their files, and are decoded at each use."""

from __future__ import annotations

import csv
import io
import signal
from pathlib import Path

import pytest
from driving import TINY_FOLDER, Death, Process, assignments, picture, results, run_here
from PIL import Image

WORDS = [*TINY_FOLDER, "pretext.epochs=2", "selflabel.epochs=2", "runtime.checkpoint_seconds=0", "--quiet"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """72 photographs of three classes: of several formats, shapes and orientations."""
    root = tmp_path_factory.mktemp("photographs")
    for number in range(72):
        folder = root / "abc"[number % 3]
        folder.mkdir(exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        image = picture(number, "L" if number % 5 == 0 else "RGB", (20 + number % 7, 20 + number % 4))
        image.save(folder / f"{number:03d}.{('jpg', 'png', 'webp', 'tif')[number % 4]}", exif=exif)
    return root


@pytest.fixture(scope="module")
def resident(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the photographs that keeps them in memory."""
    folder = tmp_path_factory.mktemp("resident") / "run"
    result = run_here("run", "--data", photographs, *WORDS, "data.resident=host", "--out", folder)
    assert result.code == 0, result.err
    return folder


@pytest.mark.parametrize("workers", [1, 3])
def test_streaming_ends_in_the_bits_of_a_resident_run(
    workers: int, photographs: Path, resident: Path, tmp_path: Path
) -> None:
    words = ["run", "--data", photographs, *WORDS, "data.resident=files", f"data.workers={workers}"]
    result = run_here(*words, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    found = results(tmp_path / "run")
    assert found == results(resident)
    assert set(found["summary.json"]["stages"]) == {"pretext", "mining", "clustering", "selflabel"}
    assert set(found["summary.json"]["baselines"]) == {"kmeans_pixels", "kmeans_features"}


def test_killed_in_mid_epoch_and_gone_on_with_in_another_way(photographs: Path, resident: Path, tmp_path: Path) -> None:
    """Where the images are kept and how many threads decode them may change from start to start."""
    words = ["run", "--data", photographs, *WORDS, "--out", tmp_path / "run"]
    ways = ["data.resident=files data.workers=2", "data.resident=host", "data.resident=files data.workers=4"]
    deaths = [Death(2, name="pretext.pt"), Death(2, name="clustering.pt"), Death(3, name="selflabel.pt")]
    for way, death in zip(ways, deaths, strict=True):
        killed = Process(*words, *way.split(), log=tmp_path / "log", death=death).result()
        assert killed.code == -signal.SIGKILL, killed.err
    done = Process(*words, *ways[0].split(), log=tmp_path / "log").result()
    assert done.code == 0, done.err
    assert results(tmp_path / "run") == results(resident)


def test_the_run_says_where_its_images_are(photographs: Path, tmp_path: Path) -> None:
    words = ["pretext", "--data", photographs, *TINY_FOLDER, "data.resident=files"]
    assert "decoded from their files at each use" in run_here(*words, "--out", tmp_path / "run").out
    message = run_here(*words[:-1], "data.resident=device", "runtime.device=cpu", "--out", tmp_path / "other").refusal()
    assert "data.resident=device needs a CUDA device" in message


def test_a_photograph_that_vanishes_in_training_is_named(photographs: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    root.mkdir()
    for number in range(20):
        picture(number).save(root / f"{number:03d}.png")
    words = ["run", "--data", root, "--clusters", 3, *WORDS, "data.resident=files", "--out", tmp_path / "run"]
    killed = Process(*words, log=tmp_path / "log", death=Death(1, name="pretext-final.pt")).result()
    assert killed.code == -signal.SIGKILL
    (root / "007.png").write_bytes(b"")
    assert "007.png" in run_here(*words).refusal()


@pytest.mark.parametrize("crop", ["file", "whole"])
def test_views_cut_out_of_the_files_train_every_stage(
    crop: str, photographs: Path, resident: Path, tmp_path: Path
) -> None:
    """And the predictor looks at new images in the same way."""
    words = ["run", "--data", photographs, *WORDS, f"data.crop={crop}"]
    result = run_here(*words, "--out", tmp_path / "run")
    assert result.code == 0, result.err
    found = results(tmp_path / "run")
    assert set(found["summary.json"]["stages"]) == {"pretext", "mining", "clustering", "selflabel"}
    assert found["assignments.csv"] != results(resident)["assignments.csv"]
    rows = {row["path"]: row["confidence"] for row in assignments(tmp_path / "run")}
    predicted = run_here("predict", tmp_path / "run", photographs).out
    for row in csv.DictReader(io.StringIO(predicted)):
        assert abs(float(row["confidence"]) - float(rows[row["path"]])) < 1e-5
    message = run_here(*words, "data.resident=host", "--out", tmp_path / "other").refusal()
    assert f"crop={crop} decodes at each use" in message
