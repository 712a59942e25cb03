"""Linear heads on frozen features: what they find, what they start from, and the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sklearn.metrics import adjusted_rand_score
from torch import Tensor
from torch.nn import functional as F

from scan_fast.errors import ConfigError
from scan_fast.neighbors import topk_neighbors
from scan_fast.objectives import ObjectiveSettings, SCANSettings, TEMISettings, TURTLESettings
from scan_fast.partitions.heads import TrainedHeads, train_heads

SIZES = (80, 40, 20, 20)


def blobs(spread: float = 0.3, dimensions: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit features, their neighbours and classes of uneven size."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    centers = F.normalize(torch.randn(len(SIZES), dimensions, generator=generator), dim=1)
    noise = torch.randn(len(labels), dimensions, generator=generator) / dimensions**0.5
    features = F.normalize(centers[labels] + spread * noise, dim=1)
    _, neighbors = topk_neighbors(features, 5)
    return features, neighbors, labels


def trained(objective: ObjectiveSettings, features: Tensor, neighbors: Tensor, **changes: Any) -> TrainedHeads:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        given = {"n_clusters": 4, "heads": 3, "epochs": 10, "batch_size": 32, "lr": 0.01, "seed": 0, **changes}
        return train_heads(features, neighbors, objective, **given)
    finally:
        torch.set_num_threads(threads)


def agreement(heads: TrainedHeads, labels: Tensor) -> list[float]:
    return [adjusted_rand_score(labels, logits.argmax(dim=-1)) for logits in heads.logits]


def spoiled(labels: Tensor, share: float = 0.25) -> Tensor:
    """Return labels of which some are wrong at random."""
    generator = torch.Generator().manual_seed(1)
    wrong = torch.rand(len(labels), generator=generator) < share
    return torch.where(wrong, torch.randint(0, 4, labels.shape, generator=generator), labels)


@pytest.mark.parametrize(
    "objective",
    [
        SCANSettings(entropy_weight=2.0, prior="estimated"),
        SCANSettings(entropy_weight=2.0, prior=SIZES),
        TEMISettings(),
        TURTLESettings(prior="estimated", inner_lr=0.05),
    ],
)
def test_heads_repair_the_partition_that_they_start_from(objective: ObjectiveSettings) -> None:
    features, neighbors, labels = blobs()
    start = spoiled(labels)
    assert adjusted_rand_score(labels, start) < 0.7
    assert min(agreement(trained(objective, features, neighbors, start=start), labels)) > 0.95


def test_heads_that_start_at_random_find_even_clusters() -> None:
    features, neighbors, labels = blobs()
    rows = torch.cat([torch.arange(len(labels))[labels == c][:20] for c in range(4)])
    _, neighbors = topk_neighbors(features[rows], 5)
    heads = trained(SCANSettings(), features[rows], neighbors, lr=0.05, epochs=40)
    assert max(agreement(heads, labels[rows])) > 0.97


def test_the_weights_give_the_logits() -> None:
    features, neighbors, labels = blobs()
    heads = trained(TEMISettings(), features, neighbors, start=labels, epochs=2)
    assert heads.weight.shape == (3, 4, 24) and heads.bias.shape == (3, 4)
    expected = torch.einsum("nd,hcd->hnc", features.double(), heads.weight.double()) + heads.bias.double()[:, None]
    torch.testing.assert_close(heads.logits.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", [True, False])
def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(start: bool) -> None:
    features, neighbors, labels = blobs()
    chosen = {"start": labels} if start else {}
    first = trained(TEMISettings(), features, neighbors, epochs=2, **chosen)
    torch.rand(7)
    again = trained(TEMISettings(), features, neighbors, epochs=2, **chosen)
    other = trained(TEMISettings(), features, neighbors, epochs=2, seed=1, **chosen)
    assert first.weight.equal(again.weight) and first.logits.equal(again.logits)
    assert not first.weight.equal(other.weight)
    assert not first.weight[0].equal(first.weight[1])  # the heads of one start differ


def test_each_head_can_have_a_start_of_its_own() -> None:
    features, neighbors, labels = blobs()
    starts = torch.stack([labels, (labels + 1) % 4, torch.zeros_like(labels)])
    heads = trained(SCANSettings(entropy_weight=0), features, neighbors, start=starts, epochs=1, lr=1e-9)
    assert heads.logits.argmax(dim=-1).equal(starts)


def test_few_images_with_many_dimensions_and_without_some_neighbours() -> None:
    features, _, labels = blobs(dimensions=200)
    rows = torch.cat([torch.arange(160)[labels == c][:12] for c in range(4)])
    _, neighbors = topk_neighbors(features[rows], 5)
    neighbors[::2, 2:] = -1
    neighbors[1] = -1
    start = spoiled(labels[rows])
    heads = trained(TEMISettings(), features[rows], neighbors, start=start, batch_size=1000, epochs=100)
    assert heads.logits.isfinite().all() and max(agreement(heads, labels[rows])) > 0.97


@pytest.mark.parametrize("dimensions", [5, 20])
def test_equal_features_stay_finite(dimensions: int) -> None:
    features = F.normalize(torch.ones(12, dimensions), dim=1)
    neighbors = torch.arange(12)[:, None].roll(1, 0)
    heads = trained(TEMISettings(), features, neighbors, start=torch.arange(12) % 4, epochs=2)
    assert heads.logits.isfinite().all() and heads.weight.isfinite().all()


def test_input_that_does_not_fit_is_refused() -> None:
    features, neighbors, labels = blobs()
    objective = TEMISettings()
    cases: list[tuple[tuple[Tensor, Tensor], dict[str, Any], str]] = [
        ((features.double(), neighbors), {}, r"features must be float32 of shape \(N, D\), got torch.float64"),
        ((features, neighbors[:3]), {}, r"neighbors must be int64 of shape \(160, k\), got torch.int64 \(3, 5\)"),
        ((features, neighbors), {"n_clusters": 161}, "from 2 to the 160 images, got 161"),
        ((features, neighbors), {"start": labels[:5]}, r"shape \(160,\) or \(3, 160\), got torch.int64 \(5,\)"),
        ((features, neighbors), {"start": labels + 1}, "clusters from 0 to 3, got 1 to 4"),
    ]
    for given, changes, message in cases:
        with pytest.raises(ValueError, match=message):
            trained(objective, *given, **changes)
    with pytest.raises(ConfigError, match="one size for each of the 4 clusters, got 2 sizes"):
        trained(SCANSettings(prior=(1, 2)), features, neighbors)
    with pytest.raises(ConfigError, match=r"prior=estimated .* needs a start"):
        trained(SCANSettings(prior="estimated"), features, neighbors)
