"""Every command that computes, on two ranks: the same results as of one process."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from driving import TINY, TINY_FOLDER, Death, assignments, fill, picture, run_here, summary
from rank_runs import run_on_ranks, the_message

DIGITS = ("run", "digits", *TINY, "pretext.epochs=1", "clustering.epochs=1", "selflabel=null")


def on_two(*words: object, folder: Path) -> str:
    """Run a command on two ranks, which must succeed, and return what it prints."""
    results = run_on_ranks(2, *words, folder=folder)
    assert [result.code for result in results] == [0, 0], results
    assert not results[1].out
    return results[0].out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for kind in range(3):
        folder = tmp_path / "photos" / f"kind{kind}"
        folder.mkdir(parents=True)
        for number in range(24):
            picture(3 * number + kind).save(folder / f"{number:02d}.png")
    return tmp_path / "photos"


def columns(file: Path) -> list[tuple[str, str]]:
    with file.open(newline="") as rows:
        return [(row["path"], row["cluster"]) for row in csv.DictReader(rows)]


@pytest.mark.parametrize("clusters", ["3", "auto"])
def test_groups_of_frozen_features(photos: Path, tmp_path: Path, clusters: str) -> None:
    words = ["run", "--data", photos, "--clusters", clusters, "preset=descriptor", "data.image_size=32"]
    words += ["evaluation.batch_size=16"]
    assert run_here(*words, "--out", tmp_path / "one").code == 0
    on_two(*words, "--out", tmp_path / "two", folder=tmp_path / "logs")
    assert columns(tmp_path / "one" / "assignments.csv") == columns(tmp_path / "two" / "assignments.csv")
    if clusters == "auto":
        suggested = [json.loads((tmp_path / name / "suggested-k.json").read_text()) for name in ("one", "two")]
        assert suggested[0]["k"] == suggested[1]["k"] == 3
        scores = [[point["score"] for point in each["curve"]] for each in suggested]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    one, two = (summary(tmp_path / name)["stages"] for name in ("one", "two"))
    assert one["mining"]["purity"] == two["mining"]["purity"]
    assert one["pretext"]["knn_acc"] == two["pretext"]["knn_acc"]


def test_training_on_a_folder_whose_images_stay_in_their_files(photos: Path, tmp_path: Path) -> None:
    words = ("run", "--data", photos, "--clusters", "3", "preset=fast", *TINY_FOLDER, "data.resident=files")
    on_two(*words, "evaluation.baselines=false", "--out", tmp_path / "two", folder=tmp_path / "logs")
    assert len(assignments(tmp_path / "two")) == 72
    assert run_here(*words, "evaluation.baselines=false", "--out", tmp_path / "one").code == 0
    losses = [summary(tmp_path / name)["stages"]["clustering"]["selection_loss"] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_an_image_that_breaks_on_the_way(photos: Path, tmp_path: Path) -> None:
    words = ["run", "--data", photos, "--clusters", "3", "preset=fast", *TINY_FOLDER, "data.resident=files"]
    words += ["runtime.checkpoint_seconds=0", "evaluation.baselines=false", "--out", tmp_path / "run"]
    deaths = {0: Death(1, name="pretext.pt")}
    run_on_ranks(2, *words, folder=tmp_path / "first", deaths=deaths)
    broken = photos / "kind1" / "07.png"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2])
    message = the_message(run_on_ranks(2, *words, folder=tmp_path / "second"))
    assert "kind1/07.png" in message
    broken.write_bytes(content)
    on_two(*words, folder=tmp_path / "third")


def test_neighbours_of_a_file(tmp_path: Path) -> None:
    assert run_here(*DIGITS, "--out", tmp_path / "first").code == 0
    exported = tmp_path / "exported"
    words = ("export", tmp_path / "first", "--format", "reference", "--stage", "mining", "--out", exported)
    assert run_here(*words).code == 0
    files = [exported / f"topk-{part}-neighbors.npy" for part in ("train", "val")]
    on_two(*DIGITS, "--neighbors", *files, "--out", tmp_path / "two", folder=tmp_path / "logs")
    with np.load(tmp_path / "first" / "neighbors.npz") as one, np.load(tmp_path / "two" / "neighbors.npz") as two:
        assert (one["train"] == two["train"]).all()


def test_stages_one_by_one_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for number, command in enumerate(("pretext", "mine", "cluster")):
        on_two(command, *DIGITS[1:], "--out", folder, folder=tmp_path / f"{number}")
    assert set(summary(folder)["stages"]) == {"pretext", "mining", "clustering"}
    words = ("cluster", folder, "--again", "clustering.objective.entropy_weight=2")
    on_two(*words, folder=tmp_path / "again")
    assert "entropy_weight: 2" in (folder / "config.yaml").read_text()


def test_a_number_of_groups_is_suggested(tmp_path: Path) -> None:
    words = ("suggest-k", "digits", *TINY, "pretext.epochs=1", "--json", "--quiet")
    assert run_here(*words, "--out", tmp_path / "one").code == 0
    found = json.loads(on_two(*words, "--out", tmp_path / "two", folder=tmp_path / "logs"))
    assert found["k"] >= 2


def test_several_seeds(tmp_path: Path) -> None:
    words = ("sweep", *DIGITS[1:], "--seeds", "0,1", "--share-pretext", "--json")
    alone = run_here(*words, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    found = json.loads(on_two(*words, "--out", tmp_path / "two", folder=tmp_path / "logs"))
    expected = json.loads(alone.out)
    assert found.keys() == expected.keys()
    name = "clustering test acc"
    assert found[name]["values"] == pytest.approx(expected[name]["values"], abs=0.01)
    assert (tmp_path / "two" / "sweep.json").is_file()


def test_linear_classifiers(tmp_path: Path) -> None:
    assert run_here(*DIGITS, "--out", tmp_path / "run").code == 0
    words = ("probe", tmp_path / "run", "--labels", "10", "--draws", "1", "--json")
    expected = run_here(*words)
    assert expected.code == 0
    found = on_two(*words, folder=tmp_path / "logs")
    assert json.loads(found).keys() == json.loads(expected.out).keys()


def test_what_was_learned_so_far(tmp_path: Path) -> None:
    words = (*DIGITS, "runtime.checkpoint_seconds=0", "--out", tmp_path / "run")
    run_on_ranks(2, *words, folder=tmp_path / "first", deaths={0: Death(1, name="clustering.pt")})
    on_two("run", tmp_path / "run", "--finish", folder=tmp_path / "logs")
    assert (tmp_path / "run-so-far" / "report.html").is_file()


def test_new_images_are_listed_once_if_they_cannot_be_read(tmp_path: Path) -> None:
    assert run_here(*DIGITS, "--out", tmp_path / "run").code == 0
    fill(tmp_path / "new", 6)
    (tmp_path / "new" / "003.png").write_bytes(b"no image")
    words = ("predict", tmp_path / "run", "--data", tmp_path / "new")
    assert "003.png" in the_message(run_on_ranks(2, *words, folder=tmp_path / "logs"))
    assert len(on_two(*words, "--on-error", "skip", folder=tmp_path / "more").splitlines()) == 6
