"""Probes of features against plain loops and scikit-learn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from scan_fast.evaluation.metrics import clustering_metrics
from scan_fast.evaluation.probes import kmeans_baseline, kmeans_metrics, knn_accuracy, linear_probe


def naive_knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor, k: int, temperature: float
) -> float:
    right = 0
    for query, label in zip(queries.tolist(), query_labels.tolist(), strict=True):
        found = []
        for row, (vector, own) in enumerate(zip(bank.tolist(), bank_labels.tolist(), strict=True)):
            dot = sum(a * b for a, b in zip(query, vector, strict=True))
            found.append((-dot / (math.hypot(*query) * math.hypot(*vector)), row, own))
        votes: dict[int, float] = {}
        for similarity, _, own in sorted(found)[:k]:
            votes[own] = votes.get(own, 0) + math.exp(-similarity / temperature)
        right += min(votes, key=lambda own: (-votes[own], own)) == label
    return right / len(query_labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.1), (5, 0.1), (5, 10.0), (1000, 0.5), (20, 2e-3)])
def test_knn_equals_a_plain_loop(k: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(k)
    bank, queries = torch.randn(60, 7, generator=generator), torch.randn(41, 7, generator=generator)
    bank_labels = torch.randint(0, 4, (60,), generator=generator)
    query_labels = torch.randint(0, 4, (41,), generator=generator)
    ours = knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature)
    theirs = naive_knn(bank.double(), bank_labels, queries.double(), query_labels, k, temperature)
    assert ours == pytest.approx(theirs)


def test_knn_by_hand() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    labels = torch.tensor([1, 0, 0])
    query = torch.tensor([[5.0, 0.0]])
    # Sharp: the nearest decides. Flat: the two of class 0 outvote it.
    assert knn_accuracy(bank, labels, query, torch.tensor([1]), k=3, temperature=1e-4) == 1.0
    assert knn_accuracy(bank, labels, query, torch.tensor([0]), k=3, temperature=100.0) == 1.0
    # Unlabelled bank images do not vote, unlabelled queries do not count, a class only queries have is wrong.
    assert knn_accuracy(bank, torch.tensor([-1, 0, 0]), query, torch.tensor([0]), k=1) == 1.0
    pair = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    assert knn_accuracy(bank, labels, pair, torch.tensor([1, -1]), k=1) == 1.0
    assert knn_accuracy(bank, labels, pair, torch.tensor([1, 7]), k=1) == 0.5
    bad = torch.tensor([[float("nan"), 0.0], [1.0, 0.0]])
    assert knn_accuracy(bank, torch.tensor([0, 0, 0]), bad, torch.tensor([0, 0]), k=1) == 0.5


def test_knn_leaves_one_out() -> None:
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(60, 5, generator=generator), torch.arange(60) % 3
    labels[:4] = -1
    apart = [
        knn_accuracy(
            bank[torch.arange(60) != i], labels[torch.arange(60) != i], bank[i : i + 1], labels[i : i + 1], k=7
        )
        for i in range(4, 60)
    ]
    assert knn_accuracy(bank, labels, k=7) == pytest.approx(sum(apart) / 56)
    assert knn_accuracy(bank, labels, k=1000) == knn_accuracy(bank, labels, k=55)
    # With itself in the bank, every image would be right.
    assert knn_accuracy(bank, labels, bank, labels, k=1) == 1.0 > knn_accuracy(bank, labels, k=1)
    with pytest.raises(ValueError, match="bank must hold at least 2 labelled images if there are no queries, got 1"):
        knn_accuracy(bank[:5], labels[:5])


def test_knn_spans_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    bank, labels = torch.randn(50, 4, generator=generator), torch.arange(50) % 3
    queries, truth = torch.randn(30, 4, generator=generator), torch.arange(30) % 3
    whole = knn_accuracy(bank, labels, queries, truth, k=7)
    monkeypatch.setattr("scan_fast.evaluation.probes._QUERIES_PER_CHUNK", 7)
    assert knn_accuracy(bank, labels, queries, truth, k=7) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"bank_labels": torch.zeros(2, dtype=torch.int64)}, r"bank_labels must be integers of shape \(3,\)"),
        ({"query_labels": torch.tensor([-1])}, "query_labels must hold at least one label"),
        ({"queries": torch.zeros(2)}, "queries must be floats"),
    ],
)
def test_knn_wrong_input(change: dict[str, Any], message: str) -> None:
    arguments = {
        "bank": torch.eye(3),
        "bank_labels": torch.arange(3),
        "queries": torch.eye(3)[:1],
        "query_labels": torch.tensor([0]),
    } | change
    with pytest.raises(ValueError, match=message):
        knn_accuracy(**arguments)


def test_kmeans_is_fitted_on_unit_train_rows_only() -> None:
    data, labels = load_digits(return_X_y=True)
    train, test = data[:500], data[500:700]
    ours = kmeans_baseline(train, torch.as_tensor(test), 10, seeds=[3, 4])
    assert ours.shape == (2, 200)
    unit = (train / np.linalg.norm(train, axis=1, keepdims=True)).astype(np.float32)
    model = KMeans(10, n_init=1, random_state=3).fit(unit)
    expected = model.predict((test / np.linalg.norm(test, axis=1, keepdims=True)).astype(np.float32))
    assert (ours[0] == expected).all()
    assert (ours == kmeans_baseline(train, test, 10, seeds=[3, 4])).all()
    # A row's length does not matter.
    assert (ours == kmeans_baseline(train * 7, test * 0.01, 10, seeds=[3, 4])).all()
    metrics = kmeans_metrics(ours, labels[500:700], 10, 10)
    values = [clustering_metrics(row, labels[500:700], 10, 10)["acc"] for row in ours]
    assert metrics["acc_mean"] == pytest.approx(sum(values) / 2)
    assert metrics["acc_std"] == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    assert metrics["acc_mean"] > 0.5
    assert kmeans_metrics(ours[:1], labels[500:700], 10, 10)["acc_std"] == 0.0


def test_kmeans_wrong_input() -> None:
    with pytest.raises(ValueError, match="n_clusters must be from 1 to the 3 train images, got 4"):
        kmeans_baseline(np.eye(3), np.eye(3), 4, [0])
    with pytest.raises(ValueError, match=r"test must be numbers of shape \(N, 3\)"):
        kmeans_baseline(np.eye(3), np.eye(2), 2, [0])
    with pytest.raises(ValueError, match="train must be finite"):
        kmeans_baseline(np.array([[np.inf, 0.0]]), np.eye(2), 1, [0])
    with pytest.raises(ValueError, match="at least one seed"):
        kmeans_metrics(np.zeros((0, 2), dtype=int), [0, 1], 2, 2)


def test_linear_probe_agrees_with_scikit_learn() -> None:
    data, labels = load_digits(return_X_y=True)
    x, y = data[:800], data[800:1200]
    mean, deviation = x.mean(0), x.std(0)
    scale = np.where(deviation > 0, deviation, np.inf)
    # scikit-learn minimises C * sum of losses + |w|^2 / 2; ours the mean loss + decay |w|^2 / 2.
    model = LogisticRegression(C=1 / (800 * 1e-3), max_iter=2000, tol=1e-8).fit((x - mean) / scale, labels[:800])
    expected = model.score((y - mean) / scale, labels[800:1200])
    tensors = [torch.as_tensor(a) for a in (x, labels[:800], y, labels[800:1200])]
    ours = linear_probe(tensors[0].float(), tensors[1], tensors[2].float(), tensors[3])
    assert ours == pytest.approx(expected, abs=0.006)
    assert ours > 0.9
    assert ours == linear_probe(tensors[0].float(), tensors[1], tensors[2].float(), tensors[3])


def test_linear_probe_ignores_unlabelled_and_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 3, generator=generator)
    labels = (x[:, 0] > 0).long()
    assert linear_probe(x * 1e6 + 1e7, labels, x * 1e6 + 1e7, labels, weight_decay=1e-6) > 0.95
    wrong = torch.where(torch.arange(60) < 30, labels, -1)
    flipped = torch.cat([labels[:30], 1 - labels[30:]])
    clean = linear_probe(x, wrong, x, labels)
    assert clean > 0.9 > linear_probe(x, flipped, x, labels)
    with pytest.raises(ValueError, match="test must have train's 3 features, got 2"):
        linear_probe(x, labels, x[:, :2], labels)
    with pytest.raises(ValueError, match="weight_decay must be finite and not negative"):
        linear_probe(x, labels, x, labels, weight_decay=-1.0)
