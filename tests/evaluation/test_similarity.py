"""Near pairs, outliers and linked groups, against their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scan_fast.evaluation.similarity import linked_groups, outlier_scores, similar_pairs
from scan_fast.neighbors import topk_neighbors


def neighbours(rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    similarity, index = topk_neighbors(torch.from_numpy(rows.astype(np.float32)), k)
    return index.numpy(), similarity.numpy()


def test_pairs_are_found_once_and_only_if_near() -> None:
    index = np.array([[1, 2], [0, 3], [0, -1], [1, 0]])
    similarity = np.array([[0.9, 0.8], [0.9, 0.5], [0.8, -np.inf], [0.5, 0.95]], dtype=np.float32)
    pairs, values = similar_pairs(index, similarity, 0.8)
    assert pairs.tolist() == [[0, 1], [0, 2], [0, 3]]
    assert values.tolist() == pytest.approx([0.9, 0.8, 0.95])
    assert similar_pairs(index, similarity, 0.99)[0].shape == (0, 2)


def test_scores_are_robust_z_scores_of_the_mean_similarity() -> None:
    generator = np.random.default_rng(0)
    similarity = generator.uniform(0.5, 0.9, (101, 3)).astype(np.float32)
    index = generator.integers(0, 101, (101, 3))
    index[7, 2] = -1
    mean, score = outlier_scores(index, similarity)
    expected = similarity.astype(np.float64).mean(axis=1)
    expected[7] = similarity[7, :2].mean()
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    below = np.median(expected) - expected
    np.testing.assert_allclose(score, below / (1.4826 * np.median(np.abs(below))), rtol=1e-5)


def test_an_image_that_is_like_no_other_is_an_outlier() -> None:
    generator = np.random.default_rng(1)
    rows = np.repeat(np.eye(4, 32), 40, axis=0) + generator.normal(0, 0.05, (160, 32))
    rows[17] = generator.normal(0, 1, 32)
    _, score = outlier_scores(*neighbours(rows, 5))
    assert score.argmax() == 17 and score[17] > 10
    assert np.sort(score)[-2] < 6


def test_scores_without_spread_or_neighbours_are_zero() -> None:
    same = np.full((5, 2), 0.5, dtype=np.float32)
    assert outlier_scores(np.zeros((5, 2), int), same)[1].tolist() == [0] * 5
    mean, score = outlier_scores(np.full((3, 2), -1), np.full((3, 2), -np.inf))
    assert np.isnan(mean).all() and score.tolist() == [0] * 3
    # More than half are alike: the mean deviation takes the place of the median one.
    same[4] = 0.1
    assert outlier_scores(np.zeros((5, 2), int), same)[1].argmax() == 4


def test_one_blob_in_two_groups_is_found_and_two_blobs_are_not() -> None:
    generator = np.random.default_rng(2)
    rows = np.repeat(np.eye(3, 16), 60, axis=0) + generator.normal(0, 0.2, (180, 16))
    groups = np.repeat([0, 1, 2], 60)
    index, _ = neighbours(rows, 8)
    assert linked_groups(index, groups, affinity=0.3) == []
    groups[:60:2] = 3  # the first blob is cut at random
    (pair,) = linked_groups(index, groups, affinity=0.3)
    assert (pair.first, pair.second) == (0, 3)
    assert pair.affinity == pytest.approx(1, abs=0.25)
    # Of 179 others 29 or 30 are in the other half, and about half of all links lead there.
    assert pair.lift == pytest.approx(0.5 * 179 / 29.5, rel=0.15)


def test_links_are_counted_in_both_directions() -> None:
    index = np.array([[1, 2], [0, 2], [3, -1], [2, 0]])
    (pair,) = linked_groups(index, np.array([0, 0, 1, 1]), affinity=0)
    # Two links lead from 0 to 1 and one back; two stay inside each.
    chance = 4 * 2 / 3 + 3 * 2 / 3
    assert pair.lift == pytest.approx(3 / chance)
    assert pair.affinity == pytest.approx((3 / 8) / 1.0)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"index must be \(2, k\), got \(3, 1\)"):
        linked_groups(np.zeros((3, 1), int), np.array([0, 1]), affinity=0.3)
    with pytest.raises(ValueError, match=r"must be \(N, k\), got \(2, 1\) and \(2, 2\)"):
        similar_pairs(np.zeros((2, 1), int), np.zeros((2, 2)), 0.5)
