"""What evaluate prints of a run and of other images: purity, the classes of clusters, prototypes, over-clustering."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from driving import (
    TINY,
    TINY_FOLDER,
    accept_files,
    assignments,
    left_out,
    metrics,
    picture,
    run_here,
    summary,
    tiny_config,
)
from PIL import Image
from sklearn.metrics import confusion_matrix

from scan_fast.data.datasets import open_splits
from scan_fast.evaluation.prototypes import central_prototypes
from scan_fast.predictor import Predictor
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder

TWICE = (*TINY, "clustering.n_clusters=20", "evaluation.baselines=true", "evaluation.baseline_seeds=2")
"""Digits with twice as many clusters as classes."""


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as text:
        return list(csv.DictReader(text))


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of twenty clusters on the ten digits; to be looked at only."""
    folder = tmp_path_factory.mktemp("twice") / "run"
    result = run_here("run", "digits", *TWICE, "--out", folder)
    assert result.code == 0, result.err
    (folder / "printed.txt").write_text(result.out)
    return folder


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A folder of 24 images of another size in three classes."""
    for kind, name in enumerate(("across", "down", "slanted")):
        for number in range(8):
            (tmp_path / "labelled" / name).mkdir(parents=True, exist_ok=True)
            picture(kind + 3 * number, size=(40, 20)).save(tmp_path / "labelled" / name / f"{number}.png")
    return tmp_path / "labelled"


# -- purity ------------------------------------------------------------------------------------------------------------


def test_purity_is_of_more_neighbours_than_are_kept(finished_run: Path) -> None:
    run = RunFolder(finished_run)
    assert run.read(artifacts.NEIGHBORS).index["train"].shape[1] == 5  # mining.k
    labels = {(row["split"], row["path"]): row["label"] for row in assignments(finished_run)}
    for split, rows in run.read(artifacts.EMBEDDINGS).rows.items():
        own = np.array([label for (part, _), label in labels.items() if part == split])
        similarity = rows.astype(np.float64) @ rows.astype(np.float64).T
        np.fill_diagonal(similarity, -np.inf)
        order = np.argsort(-similarity, axis=1, kind="stable")[:, :20]
        found = summary(finished_run)["stages"]["mining"]["purity_at"][split]
        assert list(found) == ["1", "5", "20"]
        for k, value in found.items():
            # Similarities that float32 does not tell apart may change places.
            assert value == pytest.approx((own[order[:, : int(k)]] == own[:, None]).mean(), abs=2e-3)
    mined = summary(finished_run)["stages"]["mining"]
    assert mined["purity"] == mined["purity_at"]["train"]["5"]
    assert mined["test_purity"] == mined["purity_at"]["test"]["5"]


def test_purity_is_printed_by_mining_and_by_evaluate(finished: Path, images: Path, tmp_path: Path) -> None:
    by_k = summary(finished)["stages"]["mining"]["purity_at"]
    line = "mining: purity of the nearest neighbours of {} images: {}"
    expected = [
        line.format(split, ", ".join(f"{value:.4f} at k = {k}" for k, value in values.items()))
        for split, values in by_k.items()
    ]
    content = summary(finished)
    del content["stages"]["mining"]["purity_at"]  # a run of before there was any
    (finished / "summary.json").write_text(json.dumps(content))
    accept_files(finished)
    printed = run_here("evaluate", finished).out.splitlines()
    assert [each for each in printed if each.startswith("mining: purity")] == expected
    assert summary(finished)["stages"]["mining"]["purity_at"] == by_k
    again = run_here("mine", finished, "--again")
    assert [each for each in again.out.splitlines() if each.startswith("mining: purity")] == expected
    # Without labels there is none.
    for command in ("pretext", "mine"):
        result = run_here(command, "--data", images, "--clusters", 3, *TINY_FOLDER, "--out", "flat")
        assert result.code == 0 and "purity of" not in result.out
    assert set(summary(Path("flat"))["stages"]["mining"]) == {"seconds"}


# -- the final model of a run ------------------------------------------------------------------------------------------


def test_evaluate_shows_the_final_groups(finished: Path) -> None:
    found = json.loads(run_here("evaluate", finished, "--json").out)["final"]
    rows = [row for row in assignments(finished) if row["split"] == "test"]
    clusters, labels = (np.array([int(row[key]) for row in rows]) for key in ("cluster", "label"))
    assert found["match"]["method"] == "one-to-one"
    class_of = np.array([int(each["class"]) for each in found["match"]["clusters"]])
    assert sorted(class_of) == list(range(10))
    assert (class_of[clusters] == labels).mean() == pytest.approx(found["acc"])
    for cluster, each in enumerate(found["match"]["clusters"]):
        own = labels[clusters == cluster]
        assert (each["cluster"], each["images"]) == (cluster, len(own))
        assert each["acc"] == (pytest.approx((own == class_of[cluster]).mean()) if len(own) else None)
    assert found["confusion"]["counts"] == confusion_matrix(labels, class_of[clusters], labels=range(10)).tolist()
    text = run_here("evaluate", finished).out
    for word in ("selflabel, test images", "by the Hungarian method", "ACC inside", "ACC top-5", "AMI"):
        assert word in text
    assert "images by class (rows) and class of their cluster (columns)" in text


def test_a_run_without_groups_yet(tmp_path: Path) -> None:
    assert run_here("pretext", "digits", *TINY, "--out", "begun", "--quiet").code == 0
    assert run_here("evaluate", "begun").code == 0
    assert "final" not in json.loads(run_here("evaluate", "begun", "--json").out)
    message = run_here("evaluate", "begun", "--prototypes", "p.png").refusal()
    assert "begun has no groups yet; finish it first: scan-fast run begun" in message


def test_prototypes_of_a_run(finished: Path, tmp_path: Path) -> None:
    result = run_here("evaluate", finished, "--prototypes", tmp_path / "shown.png")
    assert (result.code, result.err) == (0, "")
    rows = table(tmp_path / "shown.csv")
    assert list(rows[0]) == ["cluster", "class", "path", "split", "row", "confidence", "distance"]
    by_path = {row["path"]: row for row in assignments(finished) if row["split"] == "test"}
    used = sorted({int(row["cluster"]) for row in by_path.values()})
    assert [int(row["cluster"]) for row in rows] == used
    paths = list(by_path)
    final = json.loads(run_here("evaluate", finished, "--json").out)["final"]["match"]["clusters"]
    for row in rows:
        assigned = by_path[row["path"]]
        assert assigned["cluster"] == row["cluster"]
        assert float(row["confidence"]) == pytest.approx(float(assigned["confidence"]), abs=2e-5)
        members = [each for each in by_path.values() if each["cluster"] == row["cluster"]]
        more = sum(float(each["confidence"]) > float(row["confidence"]) + 2e-5 for each in members)
        assert more < 10  # one of the ten most confident
        assert (row["split"], paths[int(row["row"])]) == ("test", row["path"])
        assert row["class"] == final[int(row["cluster"])]["class"]
    with Image.open(tmp_path / "shown.png") as image:
        assert image.width > 10 * 160 and image.height > 160


def test_prototypes_of_a_run_without_labels_or_a_test_split(images: Path, tmp_path: Path) -> None:
    assert run_here("run", "--data", images, "--clusters", 3, *TINY_FOLDER, "--out", "out", "--quiet").code == 0
    assert run_here("name", "out", 0, "stripes").code == 0
    result = run_here("evaluate", "out", "--prototypes", "shown.PNG")
    assert (result.code, result.err) == (0, "")
    rows = table(tmp_path / "shown.csv")
    assert list(rows[0]) == ["cluster", "path", "split", "row", "confidence", "distance"]
    assert {row["split"] for row in rows} == {"train"}
    assert "classes of the clusters" not in result.out and "ACC" not in result.out


def test_prototypes_of_grouped_features_are_in_the_space_of_the_groups(tmp_path: Path) -> None:
    words = ("clustering.update=features", "mining.features=backbone", "selflabel=null")
    tiny = left_out(TINY, "clustering.epochs", "clustering.batch_size")
    assert run_here("run", "digits", *tiny, *words, "--out", "out", "--quiet").code == 0
    assert run_here("evaluate", "out", "--prototypes", "shown.png").code == 0
    source = open_splits(tiny_config().data).test
    assert source is not None
    probabilities, features = Predictor.load("out").outputs(source)
    assert features.norm(dim=1).allclose(torch.ones(len(source)))
    rows, distances = central_prototypes(features, probabilities)
    found = {int(row["cluster"]): row for row in table(Path("shown.csv"))}
    assert sorted(found) == np.flatnonzero(rows >= 0).tolist()
    for cluster, row in found.items():
        assert float(row["distance"]) == pytest.approx(distances[cluster], abs=1e-4)


# -- other images ------------------------------------------------------------------------------------------------------


def test_prototypes_of_other_images(finished_run: Path, labelled: Path, images: Path, tmp_path: Path) -> None:
    words = ("evaluate", finished_run / "model.pt", "--data", labelled)
    result = run_here(*words, "--prototypes", "shown.png")
    assert (result.code, result.err) == (0, "")
    assert "prototypes: shown.png, shown.csv" in result.out
    rows = table(Path("shown.csv"))
    predictor = Predictor.load(finished_run)
    probabilities, features = predictor.outputs(predictor.source(labelled))
    clusters = probabilities.argmax(dim=1)
    assert [int(row["cluster"]) for row in rows] == clusters.unique().tolist()
    for row in rows:
        members = (clusters == int(row["cluster"])).nonzero().squeeze(1)
        best = members[probabilities[members].max(dim=1).values.argsort(descending=True, stable=True)[:10]]
        distance = (features[best] - features[best].mean(dim=0)).norm(dim=1)
        assert float(row["distance"]) == pytest.approx(float(distance.min()), abs=1e-4)
        assert row["class"] in ("across", "down", "slanted") and row["split"] == ""
    # With --json, standard output is JSON and nothing else.
    json.loads(run_here(*words, "--json", "--prototypes", "again.png").out)
    assert Path("again.csv").read_text() == Path("shown.csv").read_text()
    # Images without classes.
    unlabelled = run_here("evaluate", finished_run, "--data", images, "--prototypes", "flat.png")
    assert (unlabelled.code, unlabelled.err) == (0, "")
    assert "clusters used" in unlabelled.out and "ACC" not in unlabelled.out
    assert list(table(Path("flat.csv"))[0]) == ["cluster", "path", "split", "row", "confidence", "distance"]


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("p.jpg", "--prototypes: the picture is a PNG, with a table of the same name beside it; got p.jpg"),
        ("none/p.png", "--prototypes: there is no folder none"),
    ],
)
def test_refused_prototypes(file: str, message: str, finished_run: Path, images: Path) -> None:
    for words in (("evaluate", finished_run), ("evaluate", finished_run, "--data", images)):
        assert message in run_here(*words, "--prototypes", file).refusal()


# -- more clusters than classes ----------------------------------------------------------------------------------------


def majority(rows: list[dict[str, str]]) -> float:
    """The accuracy if every cluster takes its most frequent class, by plain counting."""
    right = 0
    for cluster in {row["cluster"] for row in rows}:
        labels = [row["label"] for row in rows if row["cluster"] == cluster]
        right += max(labels.count(label) for label in set(labels))
    return right / len(rows)


def test_both_accuracies_are_reported(twice: Path) -> None:
    rows = [row for row in assignments(twice) if row["split"] == "test"]
    found = summary(twice)["stages"]["selflabel"]["test"]
    assert found["acc_many_to_one"] == pytest.approx(majority(rows))
    assert found["acc"] < found["acc_many_to_one"]
    printed = (twice / "printed.txt").read_text()
    heading = next(line for line in printed.splitlines() if "stage" in line and "seconds" in line)
    assert heading.index("ACC many-to-one") < heading.index("ACC one-to-one") < heading.index("NMI")
    last = next(line for line in printed.splitlines() if line.startswith("│ selflabel"))
    cells = [cell.strip() for cell in last.split("│")]
    assert cells[2:4] == [f"{found['acc_many_to_one']:.3f}", f"{found['acc']:.3f}"]
    baseline = summary(twice)["baselines"]["kmeans_pixels"]
    line = next(line for line in printed.splitlines() if line.startswith("│ k-means on pixels"))
    assert [cell.strip() for cell in line.split("│")][2] == f"{baseline['acc_many_to_one_mean']:.3f}"
    assert f"acc_many_to_one {found['acc_many_to_one']:.4f}" in printed
    assert all("acc_many_to_one" in entry for entry in metrics(twice) if "acc" in entry)


def test_evaluate_compare_and_report_name_both(twice: Path, finished_run: Path) -> None:
    found = summary(twice)["stages"]["selflabel"]["test"]
    text = run_here("evaluate", twice).out
    assert "the most frequent class of each cluster, for there are more clusters than classes" in text
    assert "ACC many-to-one" in text and "ACC one-to-one" in text
    final: dict[str, Any] = json.loads(run_here("evaluate", twice, "--json").out)["final"]
    assert final["match"]["method"] == "many-to-one"
    right = sum(round(each["acc"] * each["images"]) for each in final["match"]["clusters"] if each["acc"] is not None)
    assert right / final["images"] == pytest.approx(final["acc_many_to_one"])
    compared = run_here("compare", twice, finished_run, "--csv", "table.csv").out
    assert compared.index("ACC many-to-one") < compared.index("ACC one-to-one")
    rows = {(row["run"], row["result"]): row for row in table(Path("table.csv"))}
    assert float(rows[str(twice), "selflabel"]["acc_many_to_one"]) == found["acc_many_to_one"]
    assert rows[str(finished_run), "selflabel"]["acc_many_to_one"] == ""
    assert float(rows[str(twice), "k-means on pixels"]["acc_many_to_one"]) > 0
    assert "many-to-one" not in run_here("compare", finished_run).out
    page = (twice / "report.html").read_text()
    assert page.index("accuracy, many to one") < page.index("accuracy, one to one")


def test_sweep_collects_both(tmp_path: Path) -> None:
    words = ("sweep", "digits", *TWICE, "selflabel=null", "--seeds", "0-1", "--out", "sweep", "--quiet")
    assert run_here(*words).code == 0
    found = json.loads(Path("sweep/sweep.json").read_text())
    for name in ("clustering test acc_many_to_one", "clustering test acc", "kmeans_pixels test acc_many_to_one"):
        assert len(found[name]["values"]) == 2
    values = [
        majority([row for row in assignments(Path(f"sweep/seed{seed}")) if row["split"] == "test"]) for seed in (0, 1)
    ]
    assert found["clustering test acc_many_to_one"]["values"] == pytest.approx(values)
