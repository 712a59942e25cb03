"""Results of other runs in a run folder: refused with the file's name and the command that repairs it."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import TINY, TINY_FOLDER, fill, left_out, run_here, save_sealed

from scan_fast.runs.records import Embeddings, Neighbors, StageResult

WORDS = (*TINY_FOLDER, "--clusters", "3", "--quiet", "selflabel=null", "evaluation.map=false")


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of one configuration, as far as mining, each on 24 images of its own."""
    root = tmp_path_factory.mktemp("two")
    for number, name in enumerate(("ours", "theirs")):
        fill(root / f"{name}-images", 24, first=100 * number)
        for file in sorted((root / f"{name}-images").iterdir()):
            file.rename(file.with_name(f"{int(file.stem) % 100:03d}.png"))
        out = root / name
        assert run_here("pretext", "--data", root / f"{name}-images", *WORDS, "--out", out).code == 0
        assert run_here("mine", out, "--quiet").code == 0
    return root / "ours", root / "theirs"


@pytest.mark.parametrize(
    ("name", "command", "repair"),
    [
        ("checkpoints/pretext-final.pt", "mine", "scan-fast pretext"),
        ("neighbors.npz", "cluster", "scan-fast mine"),
        ("embeddings.npz", "suggest-k", "scan-fast mine"),
    ],
)
def test_a_result_on_other_images(
    name: str, command: str, repair: str, two_runs: tuple[Path, Path], tmp_path: Path
) -> None:
    ours, theirs = two_runs
    out = tmp_path / "run"
    shutil.copytree(ours, out)
    shutil.copy(theirs / name, out / name)
    again = ("--again",) if command == "mine" else ()
    message = run_here(command, out, "--quiet", *again).refusal()
    assert f"{out / name} was made of other images than those of this run" in message
    assert f"{repair} {out} --again" in message


def test_a_checkpoint_on_other_images_or_of_another_network(two_runs: tuple[Path, Path], tmp_path: Path) -> None:
    ours, theirs = two_runs
    out, file = tmp_path / "run", "checkpoints/clustering.pt"
    shutil.copytree(ours, out)
    assert run_here("cluster", theirs, "--quiet").code == 0
    shutil.copy(theirs / file, out / file)
    message = run_here("cluster", out, "--quiet").refusal()
    assert f"{out / file} was made of other images than those of this run; remove it" in message
    state = torch.load(out / file, weights_only=True)
    weights = state["model"]
    name = next(iter(weights))
    del state["images"]
    save_sealed(state | {"model": {**weights, name: weights[name][:1]}}, out / file)
    message = run_here("cluster", out, "--quiet").refusal()
    assert f"{out / file} is of another network or optimizer: " in message and name in message
    (out / file).unlink()
    assert run_here("cluster", out, "--quiet").code == 0


def test_a_result_of_another_network_is_named(tmp_path: Path) -> None:
    for name, width in (("narrow", 0.25), ("wide", 0.5)):
        words = (*left_out(TINY, "model."), f"model.width={width}", "--out", tmp_path / name, "--quiet")
        assert run_here("pretext", "digits", *words).code == 0
    name = "checkpoints/pretext-final.pt"
    shutil.copy(tmp_path / "wide" / name, tmp_path / "narrow" / name)
    assert f"{tmp_path / 'narrow' / name} do not fit PretextModel" in run_here("mine", tmp_path / "narrow").refusal()


ROWS = np.eye(4, 3, dtype=np.float32)
INDEX = np.array([[1], [0], [3], [-1]])
SIMILARITY = np.ones((4, 1), np.float32)


def neighbors(**changes: np.ndarray) -> dict[str, np.ndarray]:
    return {"train": INDEX, "train_similarity": SIMILARITY} | changes


@pytest.mark.parametrize(
    ("load", "arrays", "reason"),
    [
        (Embeddings.load, {"train": ROWS.astype(np.int64)}, r"train must be \(N, D\) float32, got \(4, 3\) int64"),
        (Embeddings.load, {"train": ROWS[0]}, r"train must be \(N, D\) float32, got \(3,\) float32"),
        (Embeddings.load, {"train": np.where(ROWS > 0, np.nan, ROWS)}, "train holds values that are not finite"),
        (Neighbors.load, neighbors(train=INDEX + 1), "train names image 4; its images are numbered from 0 to 3"),
        (Neighbors.load, neighbors(train=INDEX - 1), "train names image -2; its images are numbered from 0 to 3"),
        (Neighbors.load, neighbors(train=INDEX.astype(np.int32)), r"train must be \(N, D\) int64"),
        (Neighbors.load, neighbors(train_similarity=SIMILARITY[:3]), r"train_similarity must be \(4, 1\) float32"),
        (Neighbors.load, neighbors(train_similarity=SIMILARITY * np.float32(np.nan)), "float32 without NaN"),
    ],
)
def test_arrays_that_cannot_be_results(
    load: Callable[[io.BytesIO], Any], arrays: dict[str, np.ndarray], reason: str
) -> None:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    file.seek(0)
    with pytest.raises(ValueError, match=reason):
        load(file)


def test_a_result_holds_tensors_by_name() -> None:
    file = io.BytesIO()
    torch.save({"model": {"weight": [1.0]}}, file)
    file.seek(0)
    with pytest.raises(ValueError, match="it is no result of a stage"):
        StageResult.load(file)
