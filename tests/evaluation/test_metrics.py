"""Metrics against brute force over permutations, scikit-learn and counts by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score
from sklearn.neighbors import NearestNeighbors

from scan_fast.evaluation.metrics import (
    clustering_metrics,
    confusion,
    match_clusters,
    metric_titles,
    neighbor_purity,
    purity_at,
)


def brute_force_accuracy(clusters: np.ndarray, labels: np.ndarray, n_clusters: int, n_classes: int) -> float:
    """The best accuracy over every injective map between clusters and classes."""
    size = max(n_clusters, n_classes)
    return max(
        float(np.mean([permutation[c] == y for c, y in zip(clusters, labels, strict=True)]))
        for permutation in itertools.permutations(range(size))
    )


@settings(max_examples=60, deadline=None)
@given(n_clusters=st.integers(1, 6), n_classes=st.integers(1, 6), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_accuracy_is_the_best_of_all_matchings(n_clusters: int, n_classes: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters, labels = rng.integers(0, n_clusters, n), rng.integers(0, n_classes, n)
    metrics = clustering_metrics(clusters, labels, n_clusters, n_classes)
    assert metrics["acc"] == pytest.approx(brute_force_accuracy(clusters, labels, n_clusters, n_classes))
    assert metrics["nmi"] == pytest.approx(normalized_mutual_info_score(labels, clusters))
    assert metrics["ari"] == pytest.approx(adjusted_rand_score(labels, clusters))
    assert metrics["ami"] == pytest.approx(adjusted_mutual_info_score(labels, clusters))
    assert ("acc_many_to_one" in metrics) == (n_clusters > n_classes)
    match = match_clusters(clusters, labels, n_clusters, n_classes)
    assert metrics["acc"] == pytest.approx(np.mean(match[clusters] == labels))
    matched = match[match >= 0]
    assert matched.size == min(n_clusters, n_classes) == np.unique(matched).size


@settings(max_examples=30, deadline=None)
@given(n_classes=st.integers(1, 5), extra=st.integers(1, 5), n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_many_to_one_takes_the_majority(n_classes: int, extra: int, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    n_clusters = n_classes + extra
    clusters, labels = rng.integers(0, n_clusters, n), rng.integers(0, n_classes, n)
    metrics = clustering_metrics(clusters, labels, n_clusters, n_classes)
    right = sum(np.bincount(labels[clusters == c]).max() for c in np.unique(clusters))
    assert metrics["acc_many_to_one"] == pytest.approx(right / n)
    match = match_clusters(clusters, labels, n_clusters, n_classes, many_to_one=True)
    assert set(np.flatnonzero(match < 0)) == set(range(n_clusters)) - set(clusters)
    assert np.mean(match[clusters] == labels) == pytest.approx(right / n)


def test_renamed_clusters_are_perfect_and_extra_clusters_are_errors() -> None:
    labels = np.repeat([0, 1, 2], 4)
    assert clustering_metrics((labels + 1) % 3, labels, 3, 3) == {"acc": 1.0, "nmi": 1.0, "ari": 1.0, "ami": 1.0}
    # Class 0 is split into clusters 0 and 3, three to one: the reference would count cluster 3 as class 0.
    split = labels.copy()
    split[0] = 3
    metrics = clustering_metrics(split, labels, 4, 3)
    assert metrics["acc"] == pytest.approx(11 / 12)
    assert metrics["acc_many_to_one"] == 1.0
    # Fewer clusters than classes: a whole class is wrong.
    assert clustering_metrics(np.minimum(labels, 1), labels, 2, 3)["acc"] == pytest.approx(8 / 12)


def test_unlabelled_images_are_left_out() -> None:
    labels = np.array([0, 0, 1, 1, -1, -1])
    clusters = np.array([1, 1, 0, 0, 0, 1])
    assert clustering_metrics(clusters, labels, 2, 2)["acc"] == 1.0
    assert confusion(clusters, labels, 2, 2).tolist() == [[2, 0], [0, 2]]


def naive_top5(probabilities: np.ndarray, labels: np.ndarray, match: np.ndarray) -> float:
    right = 0
    for row, label in zip(probabilities, labels, strict=True):
        best = sorted(range(row.size), key=lambda c: (-row[c], c))[:5]
        right += any(match[c] == label for c in best)
    return right / labels.size


@pytest.mark.parametrize(("n_clusters", "n_classes"), [(6, 6), (10, 10), (12, 8), (7, 9)])
def test_top5(n_clusters: int, n_classes: int) -> None:
    rng = np.random.default_rng(n_clusters)
    logits = rng.integers(0, 4, (200, n_clusters)).astype(float)  # many ties
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    clusters, labels = probabilities.argmax(1), rng.integers(0, n_classes, 200)
    metrics = clustering_metrics(clusters, labels, n_clusters, n_classes, probabilities)
    match = match_clusters(clusters, labels, n_clusters, n_classes)
    assert metrics["acc_top5"] == pytest.approx(naive_top5(probabilities, labels, match))
    assert metrics["acc"] <= metrics["acc_top5"] < 1


def test_top5_needs_more_than_five_classes() -> None:
    probabilities = np.full((6, 5), 0.2)
    assert "acc_top5" not in clustering_metrics(np.zeros(6, int), np.arange(6) % 5, 5, 5, probabilities)


def test_tensors_of_any_integer_type() -> None:
    labels = torch.tensor([0, 1, 1], dtype=torch.int32)
    probabilities = torch.eye(2, dtype=torch.bfloat16)[[1, 0, 0]]
    assert clustering_metrics(torch.tensor([1, 0, 0]), labels, 2, 2, probabilities)["acc"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], [0], 2, 2), "one length, got 2 and 1"),
        (([0, 2], [0, 1], 2, 2), "clusters must be from 0 to 1, got 0 to 2"),
        (([0, -1], [0, 1], 2, 2), "clusters must be from 0 to 1, got -1"),
        (([0, 1], [0, 2], 2, 2), "labels must be from -1 to 1, got 0 to 2"),
        (([0.0, 1.0], [0, 1], 2, 2), "clusters must be integers"),
        (([0, 1], [-1, -1], 2, 2), "at least one label"),
        (([], [], 2, 2), "at least one label"),
        (([0, 1], [0, 1], 2, 2, [[0.5, 0.5]]), r"probabilities must be numbers of shape \(2, 2\)"),
        (([0], [0], 1, 1, [[float("nan")]]), "probabilities must not hold NaN"),
    ],
)
def test_wrong_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustering_metrics(*arguments)


def test_confusion_counts_by_true_class_in_rows() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    clusters = np.array([2, 2, 0, 0, 0, 1])
    assert match_clusters(clusters, labels, 3, 3).tolist() == [1, 2, 0]
    assert confusion(clusters, labels, 3, 3).tolist() == [[2, 1, 0], [0, 2, 0], [0, 0, 1]]
    # Cluster 3 has no class: its image goes to the last column.
    assert confusion(np.array([2, 2, 3, 0, 0, 1]), labels, 4, 3).tolist() == [[2, 0, 0, 1], [0, 2, 0, 0], [0, 0, 1, 0]]
    # Two clusters of one class are added up.
    assert confusion(np.array([0, 1, 1]), [0, 0, 1], 2, 2, match=[0, 0]).tolist() == [[2, 0], [1, 0]]
    with pytest.raises(ValueError, match="one entry for each of 3 clusters"):
        confusion(clusters, labels, 3, 3, match=[0])


def test_purity_by_hand() -> None:
    labels = np.array([0, 0, 1, -1])
    indices = np.array([[1, 2], [0, -1], [3, 0], [0, 1]])
    # Row 0: right, wrong. Row 1: right, none. Row 2: unlabelled, wrong. Row 3 has no label itself.
    assert neighbor_purity(indices, labels) == pytest.approx(2 / 4)
    assert neighbor_purity(torch.tensor([[1], [0]]), [5, 6], candidate_labels=[6, 5]) == 1.0
    with pytest.raises(ValueError, match="from -1 to 3, got 0 to 4"):
        neighbor_purity([[4], [0], [0], [0]], labels)
    with pytest.raises(ValueError, match=r"indices must be whole numbers \(4, k\)"):
        neighbor_purity([[1]], labels)
    with pytest.raises(ValueError, match="no pair of labelled"):
        neighbor_purity([[-1]], [0])


def test_purity_at_k_equals_scikit_learns_neighbours() -> None:
    data, labels = load_digits(return_X_y=True)
    data, labels = data[:300], labels[:300]
    _, found = NearestNeighbors(n_neighbors=21, metric="cosine").fit(data).kneighbors(data)
    # The image itself is left out by its index, wherever it stands.
    others = np.array([[j for j in row if j != i][:20] for i, row in enumerate(found)])
    expected = {k: np.mean([labels[j] == labels[i] for i in range(300) for j in others[i, :k]]) for k in (1, 5, 20)}
    assert purity_at(others, labels) == pytest.approx(expected)
    assert expected[1] > expected[5] > expected[20]  # so that a wrong order of k would show


def test_purity_at_leaves_out_what_does_not_fit() -> None:
    indices = np.array([[1, 2, 3], [0, 2, -1], [3, 0, 1], [2, 1, 0]])
    labels = np.array([0, 0, 1, -1])
    assert purity_at(indices, labels) == {1: 1.0}  # row 2's first neighbour has no label
    assert purity_at(indices, labels, (2, 3, 4)) == pytest.approx({2: 2 / 5, 3: 2 / 6})
    with pytest.raises(ValueError, match="ks must be at least 1, got 0"):
        purity_at(indices, labels, (0, 1))
    with pytest.raises(ValueError, match=r"indices must be whole numbers \(N, K\)"):
        purity_at([1, 2], [0, 1])


def test_titles_put_the_majority_vote_first() -> None:
    assert metric_titles(["nmi", "confidence", "acc"]) == {"acc": "ACC", "nmi": "NMI"}
    both = metric_titles(["acc", "ami", "acc_many_to_one"])
    assert list(both.items()) == [
        ("acc_many_to_one", "ACC many-to-one"),
        ("acc", "ACC one-to-one"),
        ("ami", "AMI"),
    ]
