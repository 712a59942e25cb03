"""A finished model on images that it was not trained on: files, unlike images, and metrics with labels."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from driving import picture, run_here
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from scan_fast.data.datasets import open_splits
from scan_fast.predictor import Predictor
from scan_fast.runs.config import load_config


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


# -- predict -----------------------------------------------------------------------------------------------------------


def test_predict_takes_files(finished_run: Path, images: Path) -> None:
    whole = rows(run_here("predict", finished_run, "--data", images).out)
    one = run_here("predict", finished_run, "--data", images / "007.png")
    assert (one.code, one.err) == (0, "")
    (row,) = rows(one.out)
    assert row.pop("path") == str(images / "007.png")
    expected = {key: value for key, value in whole[7].items() if key != "path"}
    assert row["cluster"] == expected["cluster"]
    assert float(row["similarity"]) == pytest.approx(float(expected["similarity"]), abs=1e-4)
    shutil.copy(images / "003.png", "a=b.png")  # looks like a value of the configuration
    several = rows(run_here("predict", finished_run, "--data", images / "012.png", "a=b.png").out)
    assert [row["path"] for row in several] == [str(images / "012.png"), "a=b.png"]
    assert [row["cluster"] for row in several] == [whole[12]["cluster"], whole[3]["cluster"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing"], "--data: there is no file or folder nothing"),
        (["images", "images/000.png"], "--data: give one folder or source, or files only; got images among 2"),
        (["images/000.png", "images/000.png"], "--data: each file must be given once, got images/000.png again"),
        (["empty"], "no images found in empty"),
        (["broken"], "cannot read image broken/bad.png"),
    ],
)
@pytest.mark.parametrize("command", ["predict", "embed"])
def test_errors_about_images_name_them(
    command: str, words: list[str], message: str, finished_run: Path, images: Path
) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/bad.png").write_bytes(b"no image")
    line = run_here(command, finished_run, "--data", *words, "--out", "out").refusal()
    assert message in line
    assert "data.root" not in line
    assert not Path("out").exists()


def test_unreadable_images_can_be_left_out(finished_run: Path, images: Path) -> None:
    (images / "bad.png").write_bytes(b"no image")
    assert "--on-error skip" in run_here("predict", finished_run, "--data", images).refusal()
    result = run_here("predict", finished_run, "--data", images, "--on-error", "skip")
    assert result.code == 0
    assert result.err.startswith("left out 1 unreadable images, the first is bad.png: UnidentifiedImageError")
    assert len(rows(result.out)) == 36


@pytest.mark.parametrize(
    ("data", "message"),
    [("nothing", "--data: there is no folder nothing"), ("images/000.png", "--data: images/000.png is a file; give")],
)
def test_run_names_its_option_too(data: str, message: str, images: Path) -> None:
    line = run_here("run", "--data", data, "--clusters", 3).refusal()
    assert message in line
    assert "data.root" not in line
    assert f"give --data {images}" in run_here("run", images).refusal()


# -- images unlike those of the training -------------------------------------------------------------------------------


def test_the_statistics_are_those_of_the_training_images(finished_run: Path) -> None:
    predictor = Predictor.load(finished_run)
    train = open_splits(load_config(finished_run / "config.yaml").data).train
    probabilities, features = predictor.outputs(train)
    assert predictor.typicality is not None
    similarity, nearest = predictor.typicality.nearest(features)
    unlike = predictor.typicality.unlike(similarity, nearest)
    clusters = probabilities.argmax(dim=1)
    unit = F.normalize(features.double(), dim=1)
    for cluster in clusters.unique().tolist():
        center = F.normalize(unit[clusters == cluster].mean(dim=0), dim=0)
        torch.testing.assert_close(predictor.saved.centers[cluster].double(), center, atol=1e-4, rtol=0)  # type: ignore[index]
    # One in a hundred of each cluster's images, rounded up to the next, if the quantile lies between two.
    counts = torch.bincount(nearest, minlength=10)
    assert int(unlike.sum()) <= int((counts / 100).ceil().sum())
    assert int(unlike.sum()) >= 1


def test_the_columns_are_those_of_the_predictor(finished_run: Path, images: Path) -> None:
    found = rows(run_here("predict", finished_run, "--data", images).out)
    predictor = Predictor.load(finished_run)
    assert predictor.typicality is not None and predictor.saved.centers is not None
    unit = F.normalize(predictor.features(predictor.source(images)), dim=1)
    similarity, nearest = (unit @ predictor.saved.centers.T).max(dim=1)
    least = predictor.typicality.least_similarity[nearest]
    for row, value, bound in zip(found, similarity.tolist(), least.tolist(), strict=True):
        assert float(row["similarity"]) == pytest.approx(value, abs=1e-5)
        assert row["unlike"] == str(int(value < bound)) or value == pytest.approx(bound, abs=1e-5)


def test_a_model_of_an_older_version_has_no_similarity(finished_run: Path, images: Path, tmp_path: Path) -> None:
    content = torch.load(finished_run / "model.pt", weights_only=True)
    for name in ("centers", "least_similarity"):
        assert isinstance(content.pop(name), torch.Tensor)
    torch.save(content, tmp_path / "old.pt")
    assert "has no digest" in run_here("predict", tmp_path / "old.pt", "--data", images).refusal()
    assert run_here("check", tmp_path / "old.pt", "--accept").code == 0
    result = run_here("predict", tmp_path / "old.pt", "--data", images)
    assert result.code == 0, result.err
    old, new = rows(result.out), rows(run_here("predict", finished_run, "--data", images).out)
    assert list(old[0]) == ["path", "cluster", "confidence", "margin"]
    assert [row["confidence"] for row in old] == [row["confidence"] for row in new]


# -- evaluate --data ---------------------------------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of 24 images in three classes."""
    for kind, name in enumerate(("across", "down", "slanted")):
        for number in range(8):
            (tmp_path / "labelled" / name).mkdir(parents=True, exist_ok=True)
            picture(kind + 3 * number).save(tmp_path / "labelled" / name / f"{number}.png")
    return tmp_path / "labelled"


def test_evaluate_measures_a_model_on_any_labelled_folder(finished_run: Path, labelled: Path) -> None:
    table = rows(run_here("predict", finished_run, "--data", labelled).out)
    clusters = np.array([int(row["cluster"]) for row in table])
    classes = np.array([row["path"].partition("/")[0] for row in table])
    result = run_here("evaluate", finished_run / "model.pt", "--data", labelled, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["images"], found["classes"], found["clusters"]) == (24, 3, 10)
    assert found["clusters_used"] == len(set(clusters))
    assert found["nmi"] == pytest.approx(normalized_mutual_info_score(classes, clusters))
    assert found["ari"] == pytest.approx(adjusted_rand_score(classes, clusters))
    majority = sum(max(np.unique(classes[clusters == c], return_counts=True)[1]) for c in set(clusters)) / 24
    assert found["acc_many_to_one"] == pytest.approx(majority)
    assert 0 < found["acc"] <= found["acc_many_to_one"]
    counts = np.array(found["confusion"]["counts"])
    assert found["confusion"]["true"] == ["across", "down", "slanted"]
    assert counts.sum(axis=1).tolist() == [8, 8, 8]
    assert np.trace(counts[:, :3]) / 24 == pytest.approx(majority)
    text = run_here("evaluate", finished_run, "--data", labelled).out
    for word in ("ACC many-to-one", "ACC one-to-one", f"{found['ami']:.3f}", "slanted", "clusters used"):
        assert word in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["RUN", "--data", "images"], "on images: there are no classes to compare with"),
        (["RUN", "--data", "nothing"], "--data: there is no folder nothing"),
        (["RUN", "--data", "split"], "--data: split holds test, train; give one of them, such as split/train"),
        (["RUN", "--device", "cpu"], "--device goes with --data"),
        (["MODEL"], "a model is measured on the images that --data names"),
    ],
)
def test_what_evaluate_cannot_measure(
    words: list[str], message: str, finished_run: Path, images: Path, labelled: Path
) -> None:
    for part in ("train", "test"):
        shutil.copytree(labelled, f"split/{part}")
    given = [{"RUN": finished_run, "MODEL": finished_run / "model.pt"}.get(word, word) for word in words]
    assert message in run_here("evaluate", *given).refusal()
