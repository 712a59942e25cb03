"""The scores that the report shows of a summary."""

from __future__ import annotations

from typing import Any

import pytest

from scan_fast.report.content import _unsplit
from scan_fast.report.details import baselines, results, stages
from scan_fast.runs.records import Summary


def summary_of(splits: tuple[str, ...], scores: dict[str, float]) -> Summary:
    """A run with purity of each split, and scores of its last stage."""
    by_k = {"1": 0.9, "5": 0.8, "20": 0.7}
    mining: dict[str, Any] = {"seconds": 1.0, "purity": 0.75, "purity_at": {split: dict(by_k) for split in splits}}
    mining["purity_at"]["train"]["20"] = 0.6
    return Summary(0, {"mining": mining, "clustering": {"seconds": 2.0, **dict.fromkeys(splits, scores)}})


def test_purity_is_of_the_reported_images() -> None:
    held_out = _unsplit(summary_of(("train", "test"), {"acc": 0.5}))
    found = results(held_out)
    assert found is not None
    assert found[0] == "clustering, test"
    assert dict(found[1])["neighbours of the same class, 1, 5, 20 nearest"] == "90.0\u202f%, 80.0\u202f%, 70.0\u202f%"
    cells = dict(stages(held_out)[0][2])
    assert cells["purity at 20 train"] == "60.0\u202f%" and cells["purity at 20 test"] == "70.0\u202f%"
    whole = _unsplit(summary_of(("train",), {"acc": 0.5}))
    found = results(whole)
    assert found is not None
    assert found[0] == "clustering"
    assert dict(found[1])["neighbours of the same class, 1, 5, 20 nearest"] == "90.0\u202f%, 80.0\u202f%, 60.0\u202f%"
    assert dict(stages(whole)[0][2])["purity at 20"] == "60.0\u202f%"


@pytest.mark.parametrize("over", [False, True])
def test_the_majority_vote_comes_first_if_there_is_one(over: bool) -> None:
    scores = {"acc": 0.4, "nmi": 0.3} | ({"acc_many_to_one": 0.6} if over else {})
    summary = summary_of(("train", "test"), scores)
    summary.baselines = {"kmeans_pixels": {f"{key}_mean": value for key, value in scores.items()}}
    found = results(summary)
    assert found is not None
    accuracies = ["accuracy, many to one", "accuracy, one to one"] if over else ["accuracy"]
    assert [name for name, _ in found[1]][:-1] == [*accuracies, "NMI"]
    assert [name for name, _ in baselines(summary)[0][1]] == [*accuracies, "NMI"]
