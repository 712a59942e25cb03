"""The command that measures what frozen features are worth with few labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from driving import TINY_FOLDER, assignments, contents, picture, run_here
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from scan_fast.data.datasets import open_splits
from scan_fast.data.sources import TensorSource
from scan_fast.errors import DataError, UsageError
from scan_fast.probing import Images, parse_percents, predictors
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of 45 images in three classes."""
    for kind, name in enumerate(("across", "down", "slanted")):
        (tmp_path / "labelled" / name).mkdir(parents=True)
        for number in range(15):
            picture(kind + 3 * number).save(tmp_path / "labelled" / name / f"{number}.png")
    return tmp_path / "labelled"


def test_probe_of_a_run_equals_scikit_learn_on_its_features(finished_run: Path) -> None:
    before = contents(finished_run)
    result = run_here("probe", finished_run, "--labels", "100,10", "--draws", 2, "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert contents(finished_run) == before  # the run is only looked at
    assert (found["train"], found["test"], found["held_out"], found["classes"]) == (160, 449, False, 10)
    rows = {(row["features"], row["percent"]): row for row in found["rows"]}
    assert list(rows) == [(name, share) for name in ("pretext", "selflabel") for share in (10, 100)]
    splits = open_splits(RunFolder(finished_run).read(artifacts.CONFIG).data)
    assert splits.test is not None and splits.train.labels is not None and splits.test.labels is not None
    labels, truth = splits.train.labels.numpy(), splits.test.labels.numpy()
    share = np.bincount(labels) * 0.1
    for name, network in predictors(finished_run, torch.device("cpu")).items():
        x, y = (network.outputs(source)[1].double().numpy() for source in (splits.train, splits.test))
        mean, deviation = x.mean(0), x.std(0)
        row = rows[name, 100]
        assert (row["labels"], row["draws"], row["top1_std"]) == (160, 1, None)
        model = LogisticRegression(C=1 / (160 * row["weight_decays"][0]), max_iter=5000, tol=1e-8)
        model.fit((x - mean) / deviation, labels)
        assert row["top1"] == pytest.approx(model.score((y - mean) / deviation, truth), abs=0.01)
        assert 0.2 < row["top1"] < row["top5"] <= 1
        few = rows[name, 10]
        assert few["labels"] == sum(max(1, round(each)) for each in share)
        assert few["draws"] == len(few["weight_decays"]) == 2 and few["top1_std"] >= 0
        vote = KNeighborsClassifier(100, weights=lambda d: np.exp((1 - d) / 0.1), metric="cosine").fit(x, labels)
        assert found["knn"][name] == pytest.approx(vote.score(y, truth), abs=0.01)
    test = [row for row in assignments(finished_run) if row["split"] == "test"]
    assert len(test) == found["test"]
    own = json.loads((finished_run / "summary.json").read_text())["stages"]["selflabel"]["test"]
    assert found["clustering"]["acc"] == pytest.approx(own["acc"], abs=0.01)


def test_the_pretext_row_is_of_the_pretext_stage(finished_run: Path) -> None:
    networks = predictors(finished_run, torch.device("cpu"))
    learned = RunFolder(finished_run).read(artifacts.PRETEXT_MODEL).model
    for name, value in networks["pretext"].model.backbone.state_dict().items():
        assert torch.equal(value, learned[f"backbone.{name}"])
    final = RunFolder(finished_run).read(artifacts.MODEL).state_dict
    for name, value in networks["selflabel"].model.backbone.state_dict().items():
        assert torch.equal(value, final[f"backbone.{name}"])
    assert not all(torch.equal(learned[name], final[name]) for name in learned if name.startswith("backbone."))


def test_probe_prints_tables(finished_run: Path) -> None:
    result = run_here("probe", finished_run, "--draws", 2)
    assert (result.code, result.err) == (0, "")
    for word in ("top-1", "top-5", "±", "1 %", "100 %", "kNN vote with all labels, pretext", "ACC", "frozen"):
        assert word in result.out
    again = run_here("probe", finished_run, "--draws", 2, "--seed", 1)
    assert again.out != result.out and run_here("probe", finished_run, "--draws", 2).out == result.out


def test_probe_on_other_images(finished_run: Path, labelled: Path, tmp_path: Path) -> None:
    test = tmp_path / "test"
    for kind, name in ((2, "slanted"), (0, "across")):  # no image of the third class, so other numbers
        (test / name).mkdir(parents=True)
        for number in range(20, 26):
            picture(kind + 3 * number).save(test / name / f"{number}.png")
    words = ("--labels", "20,100", "--json")
    for target, names in ((finished_run / "model.pt", ["selflabel"]), (finished_run, ["pretext", "selflabel"])):
        result = run_here("probe", target, "--data", labelled, "--test", test, *words)
        assert (result.code, result.err) == (0, "")
        found = json.loads(result.out)
        assert (found["train"], found["test"], found["held_out"], found["classes"]) == (45, 12, False, 3)
        assert [row["features"] for row in found["rows"]] == [name for name in names for _ in range(2)]
        assert [row["labels"] for row in found["rows"][:2]] == [9, 45]
        # Textures are easy for any network: wrong numbers of the classes would show.
        assert found["rows"][1]["top1"] > 0.9 and found["rows"][1]["top5"] is None
    held = json.loads(run_here("probe", finished_run / "model.pt", "--data", labelled, *words).out)
    assert held["held_out"] and held["train"] + held["test"] == 45 and 2 <= held["test"] <= 18
    fewer = run_here("probe", finished_run / "model.pt", "--data", labelled, "--labels", "100").out
    assert f"{held['test']} of 45 images are held out, by a hash of the names" in fewer
    unknown = run_here("probe", finished_run, "--data", test, "--test", labelled).refusal()
    assert "--test: no training image is of the class down" in unknown


def test_a_run_without_a_test_split_or_training(labelled: Path, images: Path) -> None:
    words = (*TINY_FOLDER, "clustering.update=heads", "selflabel=null", "--quiet")
    assert run_here("run", "--data", labelled, *words, "--clusters", 3, "--out", "frozen").code == 0
    assert "The run has seen them, without their labels" in run_here("probe", "frozen", "--labels", "100").out
    found = json.loads(run_here("probe", "frozen", "--json", "--labels", "100").out)
    assert found["held_out"] and found["train"] + found["test"] == 45
    # The heads were trained on the pretext stage's own features.
    assert [row["features"] for row in found["rows"]] == ["pretext, clustering"]
    assert run_here("run", "--data", images, "--clusters", 3, *words, "--out", "flat").code == 0
    assert "flat: there are no classes to learn and to measure" in run_here("probe", "flat").refusal()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["MODEL"], "is a file: give --data with labelled images"),
        (["RUN", "--test", "images"], "--test goes with --data"),
        (["RUN", "--data", "images"], "--data images: there are no classes"),
        (["RUN", "--data", "labelled", "--test", "nothing"], "--test: there is no folder nothing"),
        (["RUN", "--data", "labelled", "--test", "split"], "--test: split holds test, train; give one of them"),
        (["RUN", "--labels", "0"], "--labels must be percentages above 0 and at most 100, such as 1,10,100; got '0'"),
        (["RUN", "--draws", "0"], "--draws must be at least 1, got 0"),
        (["nowhere"], "there is no model at nowhere"),
    ],
)
def test_what_probe_cannot_measure(
    words: list[str], message: str, finished_run: Path, labelled: Path, images: Path
) -> None:
    for part in ("train", "test"):
        shutil.copytree(labelled, f"split/{part}")
    given = [{"RUN": finished_run, "MODEL": finished_run / "model.pt"}.get(word, word) for word in words]
    assert message in run_here("probe", *given).refusal()


@pytest.mark.parametrize("text", ["", "a", "10,10", "101", "-1", "1;10", "nan"])
def test_refused_percentages(text: str) -> None:
    with pytest.raises(UsageError, match="--labels must be percentages"):
        parse_percents(text)
    assert parse_percents("10,0.5,100") == [0.5, 10, 100]


def test_one_image_cannot_be_split() -> None:
    one = TensorSource(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), None, ["a"])
    with pytest.raises(DataError, match="--data x: 1 image is too few to hold some out; add images, or give --test"):
        Images.of(one, None, ("--data x", "--test"))
