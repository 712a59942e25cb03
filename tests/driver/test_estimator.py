"""ImageClusterer: every kind of input, order, reading back, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import TINY_FOLDER, assignments, fill, picture
from torch.utils.data import Dataset

from scan_fast import ImageClusterer
from scan_fast.runs.config import parse_override

SETTINGS = {**dict(parse_override(word) for word in TINY_FOLDER), "data.image_size": 20, "data.test_fraction": 0.2}
N = 36


def clusterer(**changes: Any) -> ImageClusterer:
    return ImageClusterer(3, settings=SETTINGS, **changes)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.stack([np.asarray(picture(number)) for number in range(N)])


@pytest.fixture(scope="module")
def fitted(pixels: np.ndarray) -> ImageClusterer:
    return clusterer().fit(pixels)


class Pictures(Dataset):  # type: ignore[type-arg]
    classes = ("a", "b", "c")

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return picture(index), index % 3


def test_fit_on_an_array(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    assert fitted.labels_.shape == (N,)
    assert fitted.labels_.dtype == np.int64
    assert set(fitted.labels_) <= {0, 1, 2}
    assert fitted.probabilities_.shape == (N, 3)
    assert fitted.probabilities_.dtype == np.float32
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(fitted.labels_, fitted.probabilities_.argmax(axis=1))
    assert list(fitted.summary_["stages"]) == ["pretext", "mining", "clustering", "selflabel"]
    assert "acc" not in fitted.summary_["stages"]["clustering"]["test"]


def test_predictions_follow_the_order_of_the_input(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(fitted.predict(pixels), fitted.labels_)
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_allclose(fitted.predict_proba(pixels[order]), fitted.probabilities_[order], atol=1e-5)
    features = fitted.transform(pixels)
    assert features.dtype == np.float32
    assert len(np.unique(features.round(4), axis=0)) == N
    np.testing.assert_allclose(fitted.transform(pixels[order]), features[order], atol=1e-4)


def test_every_kind_of_input_gives_the_same(fitted: ImageClusterer, pixels: np.ndarray, tmp_path: Path) -> None:
    fill(tmp_path / "images", N)
    files = sorted((tmp_path / "images").iterdir())
    kinds: list[Any] = [tmp_path / "images", str(tmp_path / "images"), files, list(map(str, files)), Pictures()]
    kinds += [torch.from_numpy(pixels.copy())]
    for images in kinds:
        np.testing.assert_array_equal(fitted.predict(images), fitted.labels_)
        np.testing.assert_allclose(fitted.predict_proba(images), fitted.probabilities_, atol=1e-6)
    backwards = fitted.predict_proba(files[::-1])
    np.testing.assert_allclose(backwards, fitted.probabilities_[::-1], atol=1e-6)


@pytest.mark.parametrize("kind", ["folder", "files", "dataset", "tensor"])
def test_fit_on_every_kind_of_input(kind: str, pixels: np.ndarray, tmp_path: Path) -> None:
    fill(tmp_path / "images", N)
    files = sorted((tmp_path / "images").iterdir(), reverse=True)
    images: Any = {
        "folder": tmp_path / "images",
        "files": files,
        "dataset": Pictures(),
        "tensor": torch.from_numpy(pixels.copy()),
    }[kind]
    model = clusterer(out=tmp_path / "run")
    labels = model.fit_predict(images)
    np.testing.assert_array_equal(labels, model.labels_)
    np.testing.assert_array_equal(labels, model.predict(images))
    # The run's own table says the same of each image by name, wherever it was put.
    table = {row["path"]: int(row["cluster"]) for row in assignments(tmp_path / "run")}
    assert len(table) == N
    if kind == "files":
        assert [table[str(file)] for file in files] == labels.tolist()
    elif kind == "folder":
        assert [table[f"{number:03d}.png"] for number in range(N)] == labels.tolist()
    else:
        assert [table[f"image/{number:07d}"] for number in range(N)] == labels.tolist()


def test_labels_of_a_dataset_are_reported_and_change_nothing(fitted: ImageClusterer) -> None:
    model = clusterer().fit(Pictures())
    np.testing.assert_array_equal(model.labels_, fitted.labels_)
    np.testing.assert_array_equal(model.probabilities_, fitted.probabilities_)
    assert "acc" in model.summary_["stages"]["clustering"]["test"]


def test_saved_and_loaded_it_gives_the_same_bits(fitted: ImageClusterer, pixels: np.ndarray, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.pt")
    for path in (tmp_path / "model.pt", tmp_path):
        loaded = ImageClusterer.load(path)
        assert loaded.n_clusters == 3
        np.testing.assert_array_equal(loaded.predict_proba(pixels), fitted.probabilities_)
        np.testing.assert_array_equal(loaded.transform(pixels), fitted.transform(pixels))
    loaded.save(tmp_path / "again.pt")
    np.testing.assert_array_equal(ImageClusterer.load(tmp_path / "again.pt").predict(pixels), fitted.labels_)


def test_the_seed_decides_all(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(clusterer().fit(pixels).probabilities_, fitted.probabilities_)
    assert not np.array_equal(clusterer(seed=1).fit(pixels).probabilities_, fitted.probabilities_)


def test_unreadable_files_can_be_skipped(tmp_path: Path) -> None:
    fill(tmp_path / "images", N)
    (tmp_path / "images" / "bad.png").write_bytes(b"bad")
    with pytest.raises(ValueError, match=r"bad\.png"):
        clusterer().fit(tmp_path / "images")
    settings = {**SETTINGS, "data.on_error": "skip"}
    model = ImageClusterer(3, settings=settings, out=tmp_path / "run").fit(tmp_path / "images")
    assert len(model.labels_) == N
    assert (tmp_path / "run" / "skipped.csv").read_text().startswith("path,reason\nbad.png,")


def test_what_is_not_fitted_cannot_predict(pixels: np.ndarray, tmp_path: Path) -> None:
    for use in (
        lambda: clusterer().predict(pixels),
        lambda: clusterer().predict_proba(pixels),
        lambda: clusterer().transform(pixels),
        lambda: clusterer().save(tmp_path / "model.pt"),
    ):
        with pytest.raises(ValueError, match="not fitted"):
            use()
    assert not (tmp_path / "model.pt").exists()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((N, 20, 20, 3), dtype=np.float32), "uint8"),
        (np.zeros((N, 20), dtype=np.uint8), r"\(N, H, W"),
        (np.zeros((0, 20, 20, 3), dtype=np.uint8), "empty"),
        ([], "empty"),
        ([1, 2], "file paths"),
        ("nowhere", "does not exist"),
        (7, "got int"),
    ],
)
def test_refused_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clusterer().fit(images)


def test_refused_settings(pixels: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clustering\.n_clusters: .*got 1"):
        ImageClusterer(1).fit(pixels)
    with pytest.raises(ValueError, match=r"did you mean pretext\.epochs"):
        ImageClusterer(3, settings={"pretext.epoch": 3}).fit(pixels)
    with pytest.raises(ValueError, match="preset 'quick'"):
        ImageClusterer(3, preset="quick").fit(pixels)
    with pytest.raises(ValueError, match="fewer than the 40 clusters"):
        ImageClusterer(40, settings=SETTINGS).fit(pixels)
    with pytest.raises(ValueError, match="there is no model at"):
        ImageClusterer.load(tmp_path)
