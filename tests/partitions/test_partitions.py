"""Partitions of frozen features: the ways, the score, the choice and the suggested number."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist, squareform
from sklearn.metrics import adjusted_rand_score, silhouette_samples

from scan_fast.errors import ConfigError, DataError
from scan_fast.partitions import (
    WAYS,
    FeatureSpace,
    choose,
    fit_head,
    label_free_score,
    refined,
    suggest_number,
    with_head,
)
from scan_fast.partitions.linkage import average_linkage, cut, ward_linkage
from scan_fast.partitions.probe import nearest_mean_head
from scan_fast.partitions.score import group_sums, silhouettes
from scan_fast.partitions.ways import kmeans

UNEVEN = (160, 60, 30, 15, 12)


def blobs(
    sizes: tuple[int, ...] = UNEVEN, spread: float = 0.25, dim: int = 24, seed: int = 0
) -> tuple[torch.Tensor, np.ndarray]:
    """Return features around one random direction per group, in random order, and the groups."""
    rng = np.random.default_rng(seed)
    centers = rng.normal(size=(len(sizes), dim))
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = centers[labels] / np.sqrt(dim) + spread * rng.normal(size=(len(labels), dim)) / np.sqrt(dim) * 1.5
    order = rng.permutation(len(labels))
    return torch.from_numpy(rows[order].astype(np.float32)) * 3, labels[order]


@pytest.fixture(scope="module")
def space() -> FeatureSpace:
    return FeatureSpace(blobs()[0])


# -- the score ---------------------------------------------------------------------------------------------------------


def test_silhouettes_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(80, 7))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    labels = rng.integers(0, 5, 80)
    labels[0] = 5  # alone in its group
    assert np.allclose(silhouettes(labels, rows), silhouette_samples(rows, labels, metric="cosine"), atol=1e-5)


def test_one_group_of_nearly_everything_does_not_score(space: FeatureSpace) -> None:
    _, truth = blobs()
    lumped = np.zeros(len(truth), dtype=np.int64)
    lumped[:5] = np.arange(5) % 4 + 1
    assert label_free_score(truth, space).total > label_free_score(lumped, space).total + 0.5


# -- linkage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["average", "ward"])
def test_linkage_equals_that_of_scipy(method: str) -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(60, 5)).astype(np.float32)
    ones = np.ones(60)
    if method == "average":
        distance = pdist(rows)
        tree = average_linkage((-squareform(distance)).astype(np.float32), ones)
        expected = linkage(distance, "average")
    else:
        tree = ward_linkage(rows, ones)
        expected = linkage(rows, "ward")
    for k in (2, 3, 7, 20):
        assert adjusted_rand_score(cut(tree, k), fcluster(expected, k, "maxclust")) == pytest.approx(1)


def test_linkage_of_weighted_items_equals_that_of_their_members() -> None:
    rng = np.random.default_rng(3)
    means = rng.normal(size=(12, 4))
    weights = rng.integers(1, 6, 12)
    members = np.repeat(np.arange(12), weights)
    expected = linkage(means[members], "ward")  # copies of a mean are merged first, at no cost
    tree = ward_linkage(means.astype(np.float32), weights.astype(np.float64))
    for k in (2, 4, 6):
        assert adjusted_rand_score(cut(tree, k)[members], fcluster(expected, k, "maxclust")) == pytest.approx(1)


def test_a_cut_leaves_no_group_below_the_least_weight() -> None:
    rng = np.random.default_rng(4)
    rows = np.concatenate([rng.normal(0, 0.1, (40, 2)), rng.normal(3, 0.1, (30, 2)), [[50.0, 50.0], [-60.0, 10.0]]])
    tree = ward_linkage(rows.astype(np.float32), np.ones(len(rows)))
    plain, least = cut(tree, 3), cut(tree, 2, least=10)
    assert np.bincount(plain).min() == 1
    assert np.array_equal(np.flatnonzero(least < 0), [70, 71])
    assert sorted(np.bincount(least[least >= 0])) == [30, 40]


def test_the_least_weight_falls_if_there_are_too_few_large_groups() -> None:
    tree = ward_linkage(np.array([[0.0], [1.0], [10.0]], dtype=np.float32), np.ones(3))
    assert len(np.unique(cut(tree, 3, least=2))) == 3


# -- the ways ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_way_finds_uneven_groups(way: str) -> None:
    features, truth = blobs(spread=0.12)
    for variant, partition in WAYS[way](FeatureSpace(features), len(UNEVEN)).items():
        labels = partition()
        assert labels.shape == truth.shape
        assert labels.dtype == np.int64
        assert labels.min() == 0
        assert labels.max() < len(UNEVEN)
        assert adjusted_rand_score(truth, labels) > 0.6, variant


def test_smoothing_is_the_mean_over_neighbors() -> None:
    features, _ = blobs((40, 30))
    space = FeatureSpace(features)
    index = space.neighbors(10)
    assert index.shape[1] == 3  # a twentieth of 70
    rows = space.unit.astype(np.float64)
    expected = rows + rows[index].mean(axis=1)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert np.allclose(space.smoothed(10, 1), expected, atol=1e-6)


def test_kmeans_gives_the_same_bits_for_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    features, _ = blobs((300, 200, 100))
    rows = FeatureSpace(features).reduced
    first = kmeans(rows, 3, 0, starts=2)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(4):
        second = kmeans(rows, 3, 0, starts=2)
    assert np.array_equal(first[0], second[0])
    assert np.array_equal(first[1], second[1])


def test_many_images_are_linked_through_small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scan_fast.partitions.ways.LARGEST", 100)
    features, truth = blobs(spread=0.12)
    space = FeatureSpace(features)
    for way in ("linkage", "ward"):
        for partition in WAYS[way](space, len(UNEVEN)).values():
            assert adjusted_rand_score(truth, partition()) > 0.6


# -- the choice --------------------------------------------------------------------------------------------------------


def test_the_choice_is_never_worse_than_kmeans_by_the_score(space: FeatureSpace) -> None:
    choice = choose(space, 5)
    plain = next(candidate for candidate in choice.candidates if candidate.way == "kmeans")
    head, chosen = with_head(choice, space, 5)
    assert choice.best.score.total >= plain.score.total
    assert chosen.score.total >= plain.score.total
    assert np.array_equal(head.logits(space.unit).argmax(dim=1).numpy(), chosen.labels)
    assert choice.best.name in choice.reason


def test_refined_heads_are_never_worse_than_kmeans_and_assign_as_they_say(space: FeatureSpace) -> None:
    choice = choose(space, 5)
    plain = next(candidate for candidate in choice.candidates if candidate.way == "kmeans")
    head, chosen, heads = refined(choice, space, 5, heads=2)
    assert len(heads) == 4
    assert chosen.score.total >= plain.score.total
    assert np.array_equal(head.logits(space.unit).argmax(dim=1).numpy(), chosen.labels)
    none, kept, nothing = refined(choice, space, 5, {})
    assert not nothing
    assert np.array_equal(none.logits(space.unit).argmax(dim=1).numpy(), kept.labels)


def test_the_choice_finds_the_uneven_groups_that_kmeans_cuts() -> None:
    features, truth = blobs((400, 40, 40, 30, 20), spread=0.4)
    space = FeatureSpace(features)
    choice = choose(space, 5)
    plain = next(candidate for candidate in choice.candidates if candidate.way == "kmeans")
    best = adjusted_rand_score(truth, choice.best.labels)
    assert best > adjusted_rand_score(truth, plain.labels) + 0.1
    assert best > 0.9


def test_the_choice_repeats_bit_by_bit() -> None:
    features, _ = blobs()
    first, second = (choose(FeatureSpace(features), 4) for _ in range(2))
    assert [c.name for c in first.candidates] == [c.name for c in second.candidates]
    for a, b in zip(first.candidates, second.candidates, strict=True):
        assert np.array_equal(a.labels, b.labels)
        assert a.score == b.score


def test_kmeans_alone_can_be_asked_for(space: FeatureSpace) -> None:
    assert [candidate.way for candidate in choose(space, 3, ways=()).candidates] == ["kmeans"]


def test_a_head_of_kmeans_assigns_to_the_nearest_mean(space: FeatureSpace) -> None:
    labels, _ = kmeans(space.unit, 4, 0, starts=3)
    means = group_sums(labels, space.unit, 4) / np.bincount(labels)[:, None]
    nearest = ((space.unit[:, None] - means[None]) ** 2).sum(axis=2).argmin(axis=1)
    head = nearest_mean_head(labels, space.unit, 4)
    assert np.array_equal(head.logits(space.unit).argmax(dim=1).numpy(), nearest)


def test_a_fitted_head_is_that_of_scikit_learn(space: FeatureSpace) -> None:
    from sklearn.linear_model import LogisticRegression

    labels, _ = kmeans(space.reduced, 3, 0, starts=3)
    head = fit_head(labels, space.unit, 3, 0)
    expected = LogisticRegression(C=3.0, tol=1e-10, max_iter=2000).fit(space.unit.astype(np.float64), labels)
    ours = head.logits(space.unit).softmax(dim=1).numpy()
    assert np.allclose(ours, expected.predict_proba(space.unit), atol=2e-3)


# -- the number --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(60, 60, 60, 60), (150, 70, 40, 30, 20, 15)])
def test_the_number_of_clear_groups_is_suggested(sizes: tuple[int, ...]) -> None:
    features, _ = blobs(sizes, spread=0.1, dim=32)
    suggestion = suggest_number(FeatureSpace(features))
    assert suggestion.k == len(sizes)
    assert not suggestion.at_the_edge
    assert [point.k for point in suggestion.curve] == sorted({point.k for point in suggestion.curve})
    assert all(-1 <= point.stability <= 1 for point in suggestion.curve)


def test_given_numbers_are_tried_and_no_others(space: FeatureSpace) -> None:
    suggestion = suggest_number(space, [3, 5, 9])
    assert [point.k for point in suggestion.curve] == [3, 5, 9]


@pytest.mark.parametrize("numbers", [[], [1, 3], [3, 10_000]])
def test_numbers_that_cannot_be_are_refused(space: FeatureSpace, numbers: list[int]) -> None:
    with pytest.raises(ConfigError, match="from 2 to the 277 images"):
        suggest_number(space, numbers)


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_equal_images_are_refused() -> None:
    with pytest.raises(DataError, match="all 10 images have the same features"):
        FeatureSpace(torch.ones(10, 4))


def test_two_images_are_too_few() -> None:
    with pytest.raises(DataError, match="2 images are too few"):
        FeatureSpace(torch.randn(2, 4))


def test_features_that_are_not_finite_are_refused_by_row() -> None:
    features = torch.randn(10, 4)
    features[7, 1] = float("nan")
    with pytest.raises(DataError, match="image 7"):
        FeatureSpace(features)


def test_more_groups_than_images_are_refused(space: FeatureSpace) -> None:
    with pytest.raises(ConfigError, match="278 groups of 277 images"):
        choose(space, 278, ways=())


@pytest.mark.parametrize("n", [3, 4, 7, 12, 25])
def test_a_handful_of_images_can_be_grouped(n: int) -> None:
    features = torch.randn(n, 6, generator=torch.Generator().manual_seed(0))
    space = FeatureSpace(features)
    for k in {2, 3, n} & set(range(2, n + 1)):
        _, chosen = with_head(choose(space, k), space, k)
        assert chosen.labels.shape == (n,)
    assert suggest_number(space).k >= 2


def test_duplicates_do_not_break_anything() -> None:
    base, _ = blobs((20, 20))
    space = FeatureSpace(base.repeat(3, 1))
    assert len(np.unique(choose(space, 2).best.labels)) == 2
