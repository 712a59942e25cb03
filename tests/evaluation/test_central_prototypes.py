"""Central prototypes against a plain search in Python's own numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast.evaluation.prototypes import central_prototypes


def plain_search(features: np.ndarray, probabilities: np.ndarray, pool: int) -> list[tuple[int, float]]:
    found = []
    for cluster in range(probabilities.shape[1]):
        members = [i for i, row in enumerate(probabilities.tolist()) if row.index(max(row)) == cluster]
        members = sorted(members, key=lambda i: (-probabilities[i, cluster], i))[:pool]
        if not members:
            found.append((-1, math.nan))
            continue
        mean = [sum(float(features[i, d]) for i in members) / len(members) for d in range(features.shape[1])]
        distances = {i: math.dist([float(x) for x in features[i]], mean) for i in members}
        best = min(members, key=lambda i: (round(distances[i], 9), i))
        found.append((best, distances[best]))
    return found


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 60),
    k=st.integers(1, 5),
    d=st.integers(1, 4),
    pool=st.integers(1, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_equals_a_plain_search(n: int, k: int, d: int, pool: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, d)).astype(np.float32)
    probabilities = rng.choice([0.1, 0.3, 0.3, 0.8], size=(n, k))  # many equal ones
    rows, distances = central_prototypes(features, probabilities, pool)
    expected = plain_search(features, probabilities, pool)
    assert rows.dtype == np.int64
    if d > 1:  # on a line, two members may be equally far from the middle, up to rounding
        assert rows.tolist() == [row for row, _ in expected]
    np.testing.assert_allclose(distances, [distance for _, distance in expected], atol=1e-6)


def test_only_the_ten_most_confident_decide_and_no_foreign_image_does() -> None:
    # Twelve members on a line at 0 to 11; the two least confident are far away and would move the mean.
    positions = [*range(10), 1000.0, 2000.0, 4.4]
    confidence = [0.9] * 10 + [0.6, 0.6]
    probabilities = torch.tensor([[c, 1 - c] for c in confidence] + [[0.1, 0.9]])
    features = torch.tensor(positions)[:, None]
    rows, distances = central_prototypes(features, probabilities)
    # The mean is 4.5, and 4 and 5 are equally far. Row 12 is nearer, but of the other cluster, which has it alone.
    assert rows.tolist() == [4, 12]
    np.testing.assert_allclose(distances, [0.5, 0.0])
    assert central_prototypes(features[:, :], probabilities, pool=12)[0][0] == 9
    assert central_prototypes(features.half(), probabilities.bfloat16())[0].tolist() == [4, 12]


def test_an_empty_cluster_has_none() -> None:
    rows, distances = central_prototypes(np.eye(2), np.array([[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]]))
    assert rows.tolist() == [-1, 0, -1]
    assert np.isnan(distances[[0, 2]]).all()


@pytest.mark.parametrize(
    ("features", "probabilities", "pool", "message"),
    [
        (np.eye(2), np.eye(2), 0, "pool must be at least 1, got 0"),
        (np.eye(3), np.eye(2), 10, r"features must be floats of shape \(2, D\)"),
        (np.eye(2), np.eye(2, dtype=int), 10, r"probabilities must be floats of shape \(N, K\)"),
        (np.array([[np.nan], [1.0]]), np.eye(2), 10, "features must be finite"),
        (np.eye(2), np.array([[np.inf, 0], [0, 1.0]]), 10, "probabilities must be finite"),
    ],
)
def test_central_prototypes_wrong_input(
    features: np.ndarray, probabilities: np.ndarray, pool: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        central_prototypes(features, probabilities, pool)
