"""The classes of clusters against counts by hand and brute force."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast.evaluation.matching import Match


def test_one_to_one_by_hand() -> None:
    clusters = [0, 0, 0, 1, 1, 2, 2]
    labels = [1, 1, 0, 0, -1, 1, 1]  # clusters 0 and 2 both hold class 1 mostly; 2 holds nothing else
    match = Match.of(clusters, labels, 3, 3)
    assert not match.many_to_one and "Hungarian" in match.method
    assert match.classes[1] == 0 and sorted(match.classes) == [0, 1, 2]
    assert match.images.tolist() == [3, 2, 2]
    assert match.share[1] == 1.0  # of its two images one has a label
    assert match.names(["a", "b", "c"])[1] == "a"


def test_more_clusters_than_classes_are_matched_by_majority() -> None:
    match = Match.of([0, 0, 0, 1, 1, 3], [1, 1, 0, 1, -1, -1], 5, 2)
    assert match.many_to_one and "most frequent class" in match.method
    assert match.classes.tolist() == [1, 1, -1, -1, -1]
    assert match.images.tolist() == [3, 2, 0, 1, 0]
    np.testing.assert_allclose(match.share, [2 / 3, 1, np.nan, np.nan, np.nan])
    found = json.loads(json.dumps(match.to_dict(["a", "b"])))
    assert found["method"] == "many-to-one"
    assert found["clusters"][0] == {"cluster": 0, "class": "b", "images": 3, "acc": pytest.approx(2 / 3)}
    assert found["clusters"][3] == {"cluster": 3, "class": None, "images": 1, "acc": None}


@settings(max_examples=40, deadline=None)
@given(n_clusters=st.integers(1, 5), n_classes=st.integers(1, 5), n=st.integers(1, 30), seed=st.integers(0, 2**32 - 1))
def test_shares_add_up_to_the_best_accuracy(n_clusters: int, n_classes: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters, labels = rng.integers(0, n_clusters, n), rng.integers(0, n_classes, n)
    match = Match.of(clusters, labels, n_clusters, n_classes)
    right = np.nansum(match.share * match.images)
    if n_clusters > n_classes:
        best = sum(np.bincount(labels[clusters == c]).max() for c in np.unique(clusters))
    else:
        best = max(
            sum(order[c] == y for c, y in zip(clusters, labels, strict=True))
            for order in itertools.permutations(range(n_classes), n_clusters)
        )
    assert right == pytest.approx(best)
