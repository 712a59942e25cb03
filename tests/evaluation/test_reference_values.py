"""Values of the SCAN project's own functions (wvangansbeke/Unsupervised-Classification), which ours must give as well.

The inputs are formulas of whole numbers, so they are the same everywhere. The constants are what the project's
functions returned for them, on a processor:

- accuracy, NMI, ARI, top-5 accuracy and matching: ``hungarian_evaluate`` in ``utils/evaluate_utils.py``;
- the confusion matrix: what ``confusion_matrix`` in ``utils/utils.py`` draws when ``hungarian_evaluate`` calls it;
- the vote of neighbours: ``contrastive_evaluate`` with ``MemoryBank.weighted_knn`` in ``utils/memory.py``;
- neighbours and their purity: ``MemoryBank.mine_nearest_neighbors``;
- the loss by which a head is chosen: ``scan_evaluate`` in ``utils/evaluate_utils.py``;
- prototypes: ``get_prototypes`` in ``eval.py``.

The project has no function for the majority vote of over-clustering. Its constant is the accuracy that
``hungarian_evaluate`` gives if each image's cluster is replaced by the most frequent class of that cluster. One to one
is then the best matching, so this accuracy is the vote's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scan_fast.data.neighbor_files import read_neighbors
from scan_fast.evaluation.metrics import (
    clustering_metrics,
    confusion,
    match_clusters,
    neighbor_purity,
    purity_at,
)
from scan_fast.evaluation.model_selection import selection_loss
from scan_fast.evaluation.probes import knn_accuracy
from scan_fast.evaluation.prototypes import central_prototypes
from scan_fast.neighbors import topk_neighbors

N, N_CLASSES, N_HEADS = 150, 7, 4


def classes(count: int, step: int = 0) -> NDArray[np.int64]:
    """Return the class of each image. The last class has about twice as many as the others."""
    i = np.arange(count, dtype=np.int64)
    return np.minimum((i * 13 + step) % 31 // 4, 6)


def probabilities(labels: NDArray[np.int64], n_clusters: int, head: int = 0) -> NDArray[np.float32]:
    """Return rows that sum to one and favour one cluster (of 14 clusters, one of two) of the image's class."""
    i, j = np.arange(len(labels))[:, None], np.arange(n_clusters)[None]
    weights = 1 + (i * (37 + 4 * head) + j * 53 + i * j * 11 + i * i * 7) % 101
    own = (labels[:, None] * 3 + 2 + (i % 2) * (n_clusters > 7) * 7) % n_clusters
    weights = weights + (j == own) * ((i * 29 + head * 17) % 131)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def features(count: int, part: int) -> NDArray[np.float32]:
    """Return (count, 12) rows of length one, in which the classes can be told apart a little."""
    labels = classes(count, part)
    i, d = np.arange(count)[:, None], np.arange(12)[None]
    values = ((i * 31 + d * 17 + i * d * 13 + i * i * (5 + part)) % 211 - 105) + 60.0 * (labels[:, None] == d % 7)
    return (values / np.sqrt((values * values).sum(axis=1, keepdims=True))).astype(np.float32)


CLASSES = classes(N)
BANK, QUERIES = torch.from_numpy(features(N, 0)), torch.from_numpy(features(60, 1))

MATCH = [4, 2, 0, 5, 3, 1, 6]
# Rows are true classes. The project divides the columns, not the rows, by the number of images of each class.
CONFUSION = [
    [0.8, 0.052631579, 0.052631579, 0.0, 0.0, 0.0, 0.058823529],
    [0.05, 0.736842105, 0.0, 0.0, 0.0, 0.105263158, 0.058823529],
    [0.1, 0.052631579, 0.789473684, 0.0, 0.0, 0.0, 0.029411765],
    [0.0, 0.052631579, 0.0, 0.85, 0.052631579, 0.052631579, 0.0],
    [0.0, 0.052631579, 0.052631579, 0.1, 0.684210526, 0.052631579, 0.029411765],
    [0.0, 0.0, 0.052631579, 0.1, 0.052631579, 0.789473684, 0.0],
    [0.15, 0.052631579, 0.052631579, 0.0, 0.157894737, 0.157894737, 0.676470588],
]
# Each image itself and its five nearest.
NEIGHBORS = {
    0: [0, 129, 97, 113, 63, 52],
    25: [25, 85, 94, 135, 44, 118],
    50: [50, 83, 81, 122, 147, 78],
    75: [75, 36, 59, 108, 135, 109],
    100: [100, 84, 68, 3, 141, 5],
    125: [125, 109, 135, 106, 13, 115],
}
PURITY = {1: 0.29333333333333333, 5: 0.26266666666666666, 20: 0.25333333333333335}


def test_metrics_are_the_projects() -> None:
    p = probabilities(CLASSES, N_CLASSES)
    found = clustering_metrics(p.argmax(axis=1), CLASSES, N_CLASSES, N_CLASSES, p)
    expected = {
        "acc": 0.7533333333333333,
        "nmi": 0.5567987963411207,
        "ari": 0.49206867502138746,
        "acc_top5": 0.9666666666666667,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    assert match_clusters(p.argmax(axis=1), CLASSES, N_CLASSES, N_CLASSES).tolist() == MATCH


def test_confusion_is_the_projects() -> None:
    clusters = probabilities(CLASSES, N_CLASSES).argmax(axis=1)
    counts = confusion(clusters, CLASSES, N_CLASSES, N_CLASSES)
    np.testing.assert_allclose(counts / np.bincount(CLASSES)[None, :], CONFUSION, atol=1e-6)


def test_majority_vote_of_over_clustering_is_the_projects() -> None:
    p = probabilities(CLASSES, 2 * N_CLASSES)
    clusters = p.argmax(axis=1)
    found = clustering_metrics(clusters, CLASSES, 2 * N_CLASSES, N_CLASSES, p)
    expected = {"acc_many_to_one": 0.7133333333333334, "nmi": 0.4722838765137114, "ari": 0.2509718004920692}
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)
    # One to one, the project takes the first seven clusters only, and counts all others as class 0, which may even be
    # right. Ours takes the seven clusters that fit best, and counts all others as errors.
    kept = np.where(clusters < N_CLASSES, clusters, -1)
    first = match_clusters(kept[kept >= 0], CLASSES[kept >= 0], N_CLASSES, N_CLASSES)
    given = np.where(kept >= 0, first[kept], 0)
    assert (given == CLASSES).mean() == pytest.approx(0.44666666666666666, abs=1e-6)


@pytest.mark.parametrize(
    ("k", "temperature", "expected"), [(100, 0.1, 0.3), (100, 0.07, 0.3), (20, 0.5, 0.5), (1, 0.1, 0.2666666666666667)]
)
def test_vote_of_neighbours_is_the_projects(k: int, temperature: float, expected: float) -> None:
    own, labels = torch.from_numpy(CLASSES), torch.from_numpy(classes(60, 1))
    found = knn_accuracy(BANK, own, QUERIES, labels, k=k, temperature=temperature)
    assert found == pytest.approx(expected, abs=1e-6)


def with_itself(k: int) -> NDArray[np.int64]:
    return np.concatenate([np.arange(N)[:, None], topk_neighbors(BANK, k)[1].numpy()], axis=1)


def test_neighbours_and_their_purity_are_the_projects(tmp_path: Path) -> None:
    assert {row: with_itself(5)[row].tolist() for row in NEIGHBORS} == NEIGHBORS
    assert purity_at(with_itself(20)[:, 1:], CLASSES) == pytest.approx(PURITY, abs=1e-6)
    # The project's files name the image itself first; its purity leaves out the first column.
    np.save(tmp_path / "topk-train-neighbors.npy", with_itself(20))
    read = read_neighbors(tmp_path / "topk-train-neighbors.npy", N)
    assert purity_at(read, CLASSES) == pytest.approx(PURITY, abs=1e-6)
    # With the image itself, one more neighbour of k + 1 is always right.
    for k, value in PURITY.items():
        assert neighbor_purity(with_itself(k), CLASSES) == pytest.approx((k * value + 1) / (k + 1), abs=1e-6)


def test_loss_that_chooses_the_head_is_the_projects() -> None:
    p = torch.from_numpy(np.stack([probabilities(CLASSES, N_CLASSES, head) for head in range(N_HEADS)]))
    neighbors = topk_neighbors(BANK, 5)[1]
    total, consistency, entropy = selection_loss(p, neighbors)
    expected = [-0.06362748146057129, -0.0646505355834961, -0.05331385135650635, -0.0417327880859375]
    assert total.tolist() == pytest.approx(expected, abs=1e-6)
    expected = [1.8816993236541748, 1.8793158531188965, 1.8910341262817383, 1.9034144878387451]
    assert consistency.tolist() == pytest.approx(expected, abs=1e-6)
    expected = [1.945326805114746, 1.9439663887023926, 1.9443479776382446, 1.9451472759246826]
    assert entropy.tolist() == pytest.approx(expected, abs=1e-6)
    assert int(total.argmin()) == 1
    # The same if the neighbours name the image itself already.
    again = selection_loss(p, torch.from_numpy(with_itself(5)), include_self=False)[0]
    assert torch.equal(again, total)


@pytest.mark.parametrize(
    ("pool", "expected"), [(10, [80, 8, 124, 128, 94, 103, 112]), (4, [80, 89, 124, 4, 63, 141, 112])]
)
def test_prototypes_are_the_projects(pool: int, expected: list[int]) -> None:
    rows, _ = central_prototypes(BANK, probabilities(CLASSES, N_CLASSES), pool)
    assert rows.tolist() == expected
