"""ImageClusterer: every kind of input, order, reading back, and what it refuses."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from containers import Item, write_shards
from driving import TINY_FOLDER, assignments, fill, picture
from sklearn.exceptions import NotFittedError
from torch.utils.data import Dataset

from scan_fast import ImageClusterer
from scan_fast.errors import RunError
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


class Column:
    """A column of a table, as pandas has: its own index, and an array inside."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, key: Any) -> Any:
        raise KeyError(key)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=object)


def test_fit_on_an_array(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    assert fitted.labels_.shape == (N,)
    assert fitted.labels_.dtype == np.int64
    assert set(fitted.labels_) <= {0, 1, 2}
    assert fitted.n_clusters_ == 3
    assert fitted.probabilities_.shape == (N, 3)
    assert fitted.probabilities_.dtype == np.float32
    np.testing.assert_allclose(fitted.probabilities_.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(fitted.labels_, fitted.probabilities_.argmax(axis=1))
    assert list(fitted.summary_["stages"]) == ["pretext", "mining", "clustering", "selflabel"]
    assert fitted.summary_["seed"] == 0
    assert "acc" not in fitted.summary_["stages"]["clustering"]["test"]


def test_predictions_follow_the_order_of_the_input(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(fitted.predict(pixels), fitted.labels_)
    np.testing.assert_array_equal(fitted.predict_proba(pixels), fitted.probabilities_)
    order = np.random.default_rng(0).permutation(N)
    np.testing.assert_allclose(fitted.predict_proba(pixels[order]), fitted.probabilities_[order], atol=1e-5)
    features = fitted.transform(pixels)
    assert features.dtype == np.float32
    assert len(np.unique(features.round(4), axis=0)) == N
    np.testing.assert_allclose(fitted.transform(pixels[order]), features[order], atol=1e-4)


def test_every_kind_of_input_gives_the_same(fitted: ImageClusterer, pixels: np.ndarray, tmp_path: Path) -> None:
    fill(tmp_path / "images", N)
    files = sorted((tmp_path / "images").iterdir())
    read_only = pixels.copy()
    read_only.setflags(write=False)
    kinds: dict[str, Any] = {
        "folder": tmp_path / "images",
        "name of a folder": str(tmp_path / "images"),
        "files": files,
        "names of files": list(map(str, files)),
        "tuple of files": tuple(files),
        "array of names": np.array(list(map(str, files))),
        "column of files": Column(files),
        "tar shards": write_shards(
            tmp_path / "shards", [Item(file.stem, file.read_bytes(), suffix="png") for file in files]
        ),
        "dataset": Pictures(),
        "tensor": torch.from_numpy(pixels.copy()),
        "PIL images": [picture(number) for number in range(N)],
        "list of arrays": list(pixels),
        "list of tensors (C, H, W)": [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in pixels],
        "read-only": read_only,
        "reversed twice": pixels[::-1].copy()[::-1],
        "in Fortran's order": np.asfortranarray(pixels),
    }
    for name, images in kinds.items():
        np.testing.assert_allclose(fitted.predict_proba(images), fitted.probabilities_, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(fitted.predict(images), fitted.labels_, err_msg=name)
    backwards = fitted.predict_proba(files[::-1])
    np.testing.assert_allclose(backwards, fitted.probabilities_[::-1], atol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_read_only_array_needs_no_warning(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    read_only = pixels.copy()
    read_only.setflags(write=False)
    np.testing.assert_array_equal(fitted.predict(read_only), fitted.labels_)


@pytest.mark.parametrize("kind", ["folder", "files", "dataset", "tensor", "PIL images"])
def test_fit_on_every_kind_of_input(kind: str, pixels: np.ndarray, tmp_path: Path) -> None:
    fill(tmp_path / "images", N)
    # Relative paths (tests run in tmp_path): which images are held out depends on their names.
    files = sorted(Path("images").iterdir(), reverse=True)
    images: Any = {
        "folder": tmp_path / "images",
        "files": files,
        "dataset": Pictures(),
        "tensor": torch.from_numpy(pixels.copy()),
        "PIL images": [picture(number) for number in range(N)],
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


def test_images_of_several_sizes(tmp_path: Path) -> None:
    shapes = [(24, 30), (26, 20), (40, 40)]  # the shorter sides are 24, 20 and 40, of which 24 is the median
    images = [picture(number, size=shapes[number % 3]) for number in range(N)]
    settings = {key: value for key, value in SETTINGS.items() if key != "data.image_size"}
    model = ImageClusterer(3, settings=settings).fit(images)
    assert model.predictor_.size == 24
    arrays = [np.asarray(image) for image in images]
    np.testing.assert_allclose(model.predict_proba(arrays), model.probabilities_, atol=1e-6)
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    assert ImageClusterer(3, settings=settings).fit(tensors).predictor_.size == 24
    large = [picture(number, size=(150, 140)) for number in range(N)]
    settings = {**settings, "model.width": 0.5}  # 8 channels crash in the gradient of PyTorch's 1x1 convolution
    assert ImageClusterer(3, settings=settings).fit(large).predictor_.size == 128


def test_labels_of_a_dataset_are_reported_and_change_nothing(fitted: ImageClusterer) -> None:
    model = clusterer().fit(Pictures())
    np.testing.assert_array_equal(model.labels_, fitted.labels_)
    np.testing.assert_array_equal(model.probabilities_, fitted.probabilities_)
    assert "acc" in model.summary_["stages"]["clustering"]["test"]


def test_saved_and_loaded_it_gives_the_same_bits(fitted: ImageClusterer, pixels: np.ndarray, tmp_path: Path) -> None:
    fitted.save(tmp_path / "model.pt")
    for path in (tmp_path / "model.pt", tmp_path):
        loaded = ImageClusterer.load(path)
        assert loaded.n_clusters == loaded.n_clusters_ == 3
        assert not hasattr(loaded, "labels_")
        np.testing.assert_array_equal(loaded.predict_proba(pixels), fitted.probabilities_)
        np.testing.assert_array_equal(loaded.transform(pixels), fitted.transform(pixels))
    loaded.save(tmp_path / "again.pt")
    np.testing.assert_array_equal(ImageClusterer.load(tmp_path / "again.pt").predict(pixels), fitted.labels_)


def test_pickled_it_gives_the_same_bits(fitted: ImageClusterer, pixels: np.ndarray, tmp_path: Path) -> None:
    joblib.dump(fitted, tmp_path / "model.joblib")
    copies = (pickle.loads(pickle.dumps(fitted)), joblib.load(tmp_path / "model.joblib"), copy.deepcopy(fitted))
    for other in copies:
        assert other.get_params() == fitted.get_params()
        np.testing.assert_array_equal(other.labels_, fitted.labels_)
        np.testing.assert_array_equal(other.predict_proba(pixels), fitted.probabilities_)
        np.testing.assert_array_equal(other.transform(pixels), fitted.transform(pixels))
    # Of a device that is not there, it comes back on the CPU.
    elsewhere = copy.copy(fitted.predictor_)
    elsewhere.device = torch.device("cuda", 99)
    assert pickle.loads(pickle.dumps(elsewhere)).device == torch.device("cpu")


def test_random_state_decides_all(fitted: ImageClusterer, pixels: np.ndarray) -> None:
    np.testing.assert_array_equal(clusterer(random_state=0).fit(pixels).probabilities_, fitted.probabilities_)
    other = clusterer(random_state=np.int64(1)).fit(pixels)
    assert other.summary_["seed"] == 1
    assert not np.array_equal(other.probabilities_, fitted.probabilities_)
    # A generator gives each fit another seed, and an equal generator the same ones.
    generators = [np.random.RandomState(5) for _ in range(2)]
    first, second = (clusterer(random_state=generator).fit(pixels) for generator in generators)
    assert first.summary_["seed"] == second.summary_["seed"]
    np.testing.assert_array_equal(first.probabilities_, second.probabilities_)
    assert second.fit(pixels).summary_["seed"] != first.summary_["seed"]
    # None draws from NumPy's global generator.
    state = np.random.get_state()  # noqa: NPY002
    try:
        np.random.seed(5)  # noqa: NPY002
        assert clusterer(random_state=None).fit(pixels).summary_["seed"] == first.summary_["seed"]
    finally:
        np.random.set_state(state)  # noqa: NPY002


def test_the_process_stays_as_it_was(pixels: np.ndarray, tmp_path: Path) -> None:
    model = ImageClusterer(3, settings={**SETTINGS, "runtime.threads": 1})
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    state, numpy_state = torch.random.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    try:
        model.fit(pixels)
        assert torch.get_num_threads() == 3
        model.predict(pixels)
        assert torch.get_num_threads() == 3
        with pytest.raises(ValueError, match=r"mining\.k=99"):
            ImageClusterer(3, settings={**SETTINGS, "runtime.threads": 1, "mining.k": 99}).fit(pixels)
        assert torch.get_num_threads() == 3
        model.save(tmp_path / "model.pt")
        ImageClusterer.load(tmp_path / "model.pt").transform(pixels)
        pickle.loads(pickle.dumps(model))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.random.get_rng_state(), state)
    np.testing.assert_array_equal(np.random.get_state(legacy=False)["state"]["key"], numpy_state)  # noqa: NPY002


def test_a_run_folder_is_of_the_same_images(pixels: np.ndarray, tmp_path: Path) -> None:
    model = clusterer(out=tmp_path / "run").fit(pixels)
    labels, spent = model.labels_, model.summary_["seconds"]
    np.testing.assert_array_equal(model.fit(pixels).labels_, labels)
    assert model.summary_["seconds"] == spent  # nothing was trained again
    changed = pixels.copy()
    changed[7, 0, 0, 0] ^= 1
    fill(tmp_path / "images", N)
    for other in (changed, pixels[:-1], tmp_path / "images"):
        with pytest.raises(RunError, match=r"run holds a run on other images: .* choose another folder for a new run"):
            model.fit(other)
    np.testing.assert_array_equal(model.labels_, labels)


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
        with pytest.raises(NotFittedError, match="ImageClusterer instance is not fitted"):
            use()
    assert not (tmp_path / "model.pt").exists()


UNIT = np.linspace(0, 1, N * 20 * 20 * 3, dtype=np.float32).reshape(N, 20, 20, 3)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (UNIT, r'got float32 in \[0, 1\]; convert them with \(x \* 255\)\.round\(\)\.astype\("uint8"\)'),
        (torch.from_numpy(UNIT), r"float32 in \[0, 1\]; .*\(x \* 255\)\.round\(\)\.to\(torch\.uint8\)"),
        (torch.from_numpy(UNIT).bfloat16(), r"bfloat16 in \[0, 1\]; .*\(x \* 255\)\.round\(\)"),
        (UNIT * 255.0, r'float32 in \[0, 255\]; convert them with x\.round\(\)\.astype\("uint8"\)'),
        (UNIT - 0.5, r"float32 in \[-0\.5, 0\.5\]; scale them to 0\.\.255 first"),
        (UNIT * np.nan, r"float32 in \[nan, nan\]; scale them"),
        (np.zeros((N, 20, 20), dtype=np.int64), r'int64 in \[0, 0\]; convert them with x\.astype\("uint8"\)'),
        (np.full((N, 20, 20), 65535, dtype=np.uint16), r"uint16 in \[65535, 65535\]; scale them"),
        (UNIT > 0.5, r'got bool; convert them with x\.astype\("uint8"\) \* 255'),
        (UNIT.astype(complex), "uint8 in 0..255, got complex128$"),
        (list(UNIT), r"item 0 must be uint8 in 0..255, got float32 in .*; convert them with \(x \* 255\)"),
        (np.zeros((N, 3, 20, 20), dtype=np.uint8), r"\(N, H, W, C\), got \(36, 3, 20, 20\); .*x\.transpose\(0, 2, 3"),
        (torch.zeros(N, 3, 20, 20, dtype=torch.uint8), r"x\.permute\(0, 2, 3, 1\)"),
        (np.zeros((N, 20), dtype=np.uint8), r"\(N, H, W"),
        (np.zeros((0, 20, 20, 3), dtype=np.uint8), "empty"),
        (np.zeros((0, 20, 20, 3)), "must be uint8 in 0..255, got float64$"),
        ([], "empty"),
        ([1, 2], r"must hold file paths only, or PIL images.*item 0 is int"),
        (["a.png", picture(0)], r"must hold file paths only, or PIL images.*item 0 is str"),
        (picture(0), r"got one PIL image; give a list: \[image\]"),
        ("nowhere", "does not exist"),
        (7, "got int"),
    ],
)
def test_refused_images(images: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clusterer().fit(images)


def test_refused_images_to_predict(fitted: ImageClusterer) -> None:
    for method in (fitted.predict, fitted.predict_proba, fitted.transform):
        with pytest.raises(ValueError, match=r'convert them with \(x \* 255\)\.round\(\)\.astype\("uint8"\)'):
            method(UNIT)


def test_refused_parameters(pixels: np.ndarray, tmp_path: Path) -> None:
    for wrong in (1, 2.0, "3", None, True):
        with pytest.raises(ValueError, match=f"n_clusters must be an integer of at least 2 or 'auto', got {wrong!r}"):
            ImageClusterer(wrong).fit(pixels)  # type: ignore[arg-type]
    for key, parameter in (("seed", "random_state"), ("clustering.n_clusters", "n_clusters"), ("preset", "preset")):
        with pytest.raises(ValueError, match=f"must not hold '{key}'; use the parameter {parameter} instead"):
            ImageClusterer(3, settings={key: 3}).fit(pixels)
    with pytest.raises(ValueError, match=r"settings must map dotted keys to values, .* got \['pretext.epochs'\]"):
        ImageClusterer(3, settings=["pretext.epochs"]).fit(pixels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="random_state must not be negative, got -1"):
        ImageClusterer(3, random_state=-1).fit(pixels)
    with pytest.raises(ValueError, match="'abc' cannot be used to seed"):
        ImageClusterer(3, random_state="abc").fit(pixels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"did you mean pretext\.epochs"):
        ImageClusterer(3, settings={"pretext.epoch": 3}).fit(pixels)
    with pytest.raises(ValueError, match="preset 'quick'"):
        ImageClusterer(3, preset="quick").fit(pixels)
    with pytest.raises(ValueError, match="29 training images are too few for 40 clusters; ask for 2 to 28"):
        ImageClusterer(40, settings=SETTINGS).fit(pixels)
    with pytest.raises(ValueError, match="there is no model at"):
        ImageClusterer.load(tmp_path)
