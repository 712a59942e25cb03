"""Prototypes and the label-free selection loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from scan_fast.evaluation.model_selection import selection_loss
from scan_fast.evaluation.prototypes import prototypes


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(0, 40),
    typical=st.integers(1, 7),
    uncertain=st.integers(1, 7),
    seed=st.integers(0, 2**32 - 1),
)
def test_prototypes_equal_a_plain_search(n: int, typical: int, uncertain: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    clusters = rng.integers(0, 3, n)
    confidence, margin = (rng.choice([0.2, 0.5, 0.9, np.nan], n) for _ in range(2))

    def key(row: int) -> tuple[float, float, int]:
        values = [-1.0 if math.isnan(x) else x for x in (confidence[row], margin[row])]
        return -values[0], -values[1], row

    for cluster in range(4):  # the last one is empty
        ordered = sorted(np.flatnonzero(clusters == cluster).tolist(), key=key)
        found = prototypes(clusters, confidence, margin, cluster, typical=typical, uncertain=uncertain)
        assert found.typical == ordered[:typical]
        assert found.uncertain == ordered[typical:][::-1][:uncertain]


def test_prototypes_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"margin must have one value for each of 2 images, got shape \(3,\)"):
        prototypes([0, 1], [0.5, 0.5], [0.1, 0.1, 0.1], 0, typical=1, uncertain=1)
    with pytest.raises(ValueError, match="clusters must be integers"):
        prototypes([0.5], [0.5], [0.1], 0, typical=1, uncertain=1)


def dense_selection(p: torch.Tensor, neighbors: torch.Tensor, include_self: bool) -> list[tuple[float, float]]:
    """Through the N x N matrix of inner products, as the original project does it."""
    results = []
    for head in p.double():
        products = head @ head.T
        pairs = [(i, int(j)) for i, row in enumerate(neighbors) for j in row if j >= 0]
        pairs += [(i, i) for i in range(head.shape[0])] if include_self else []
        consistency = F.binary_cross_entropy(
            torch.stack([products[pair] for pair in pairs]).clamp(max=1), torch.ones(len(pairs), dtype=torch.float64)
        )
        mean = head.mean(0)
        results.append((float(consistency), float(-(mean * mean.log()).sum())))
    return results


@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("elements", [1, 100, 1 << 24])
def test_selection_loss_equals_the_dense_form(
    monkeypatch: pytest.MonkeyPatch, include_self: bool, elements: int
) -> None:
    monkeypatch.setattr("scan_fast.evaluation.model_selection._ELEMENTS_PER_CHUNK", elements)
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(3, 23, 6, generator=generator)
    neighbors = torch.randint(-1, 23, (23, 4), generator=generator)
    p = logits.softmax(2)
    for given_values in (p, logits.log_softmax(2), p.double()):
        total, consistency, entropy = selection_loss(given_values, neighbors, include_self=include_self)
        for h, (c, e) in enumerate(dense_selection(p, neighbors, include_self)):
            assert consistency[h].item() == pytest.approx(c, rel=1e-5)
            assert entropy[h].item() == pytest.approx(e, rel=1e-5)
            assert total[h].item() == pytest.approx(c - e, rel=1e-5, abs=1e-5)


def test_selection_loss_prefers_the_better_clustering_and_stays_finite() -> None:
    right = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 4)
    collapsed = torch.tensor([[1.0, 0.0]] * 8)
    torn = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)
    neighbors = (torch.arange(8) ^ 1)[:, None]
    total, consistency, entropy = selection_loss(torch.stack([right, collapsed, torn]), neighbors)
    assert total.argmin() == 0
    assert total.isfinite().all()
    assert total[0].item() == pytest.approx(-math.log(2), abs=1e-6)
    assert (consistency[:2].abs() < 1e-6).all() and consistency[2] > 10
    assert entropy[1].item() == pytest.approx(0, abs=1e-6)
    # Logarithms tell pairs apart where the probabilities have underflowed.
    logits = torch.tensor([[[300.0, 0.0], [0.0, 300.0]]]).log_softmax(2)
    assert selection_loss(logits, torch.tensor([[1], [0]]), include_self=False)[1].item() == pytest.approx(
        300 - math.log(2)
    )


def test_selection_loss_takes_16_bit_and_strided_input() -> None:
    generator = torch.Generator().manual_seed(2)
    p = torch.randn(10, 2, 5, generator=generator).softmax(2).movedim(1, 0)
    neighbors = torch.randint(0, 10, (3, 10), generator=generator).T
    exact = selection_loss(p.contiguous(), neighbors.contiguous())
    for a, b in zip(selection_loss(p, neighbors.int()), exact, strict=True):
        assert torch.equal(a, b)
    rounded = selection_loss(p.bfloat16(), neighbors)
    assert torch.allclose(rounded[0], exact[0], atol=0.05)


@pytest.mark.parametrize(
    ("p", "neighbors", "message"),
    [
        (torch.randn(1, 3, 4), torch.zeros(3, 1, dtype=torch.int64), "sum to one"),
        (torch.rand(1, 3, 4) + 1, torch.zeros(3, 1, dtype=torch.int64), "sum to one"),
        (torch.full((1, 3, 4), float("nan")), torch.zeros(3, 1, dtype=torch.int64), "sum to one"),
        (torch.full((3, 4), 0.25), torch.zeros(3, 1, dtype=torch.int64), r"shape \(H, N, C\)"),
        (torch.full((1, 3, 4), 0.25), torch.zeros(2, 1, dtype=torch.int64), r"int64 of shape \(3, k\)"),
        (torch.full((1, 3, 4), 0.25), torch.full((3, 1), 3), "from -1 to 2, got 3 to 3"),
        (torch.full((1, 0, 4), 0.25), torch.zeros(0, 1, dtype=torch.int64), "none of them 0"),
    ],
)
def test_selection_loss_wrong_input(p: torch.Tensor, neighbors: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selection_loss(p, neighbors)
    with pytest.raises(ValueError, match="at least one neighbour"):
        selection_loss(torch.full((1, 1, 2), 0.5), torch.tensor([[-1]]), include_self=False)
