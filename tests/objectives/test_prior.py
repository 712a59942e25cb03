"""The sizes that clusters are expected to have: counted, given by rank, and the divergence from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from scan_fast.errors import ConfigError
from scan_fast.losses import scan_loss
from scan_fast.objectives import SCANSettings, TURTLESettings
from scan_fast.objectives.prior import ClusterPrior
from scan_fast.runs.config import build_config


def logits_of(labels: list[list[int]], clusters: int) -> Tensor:
    """Return (H, N, C) logits with these largest entries."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand((len(labels), len(labels[0]), clusters), generator=generator)
    return noise + 2 * torch.nn.functional.one_hot(torch.tensor(labels), clusters)


def test_estimated_sizes_are_smoothed_counts_of_each_head() -> None:
    prior = ClusterPrior("estimated")
    prior.start(lambda: logits_of([[0, 0, 0, 2, 0], [1, 1, 2, 2, 2]], 3))
    expected = torch.tensor([[5, 1, 2], [1, 3, 4]]) / 8
    torch.testing.assert_close(prior.log(torch.zeros(2, 3)).exp(), expected)


def test_given_sizes_go_by_rank() -> None:
    prior = ClusterPrior((1.0, 6.0, 2.0, 1.0))
    prior.start(lambda: logits_of([[3, 3, 3, 0, 0, 1], [2, 2, 2, 2, 2, 2]], 4))
    expected = torch.tensor([[2, 1, 1, 6], [1, 1, 6, 2]]) / 10  # clusters of one size in the order of their numbers
    torch.testing.assert_close(prior.log(torch.zeros(2, 4)).exp(), expected)


def test_divergence_is_that_of_scipy() -> None:
    prior = ClusterPrior((5.0, 1.0, 3.0))
    prior.start(lambda: logits_of([[0, 1, 2, 0, 2, 0]] * 2, 3))
    mean = torch.tensor([[0.2, 0.5, 0.3], [0.9, 0.1, 0.0]], dtype=torch.float64)
    expected = [scipy_entropy(row, [5 / 9, 1 / 9, 3 / 9]) for row in mean.numpy()]
    np.testing.assert_allclose(prior.divergence(mean).numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(prior.divergence(mean, prior.entropy(mean)).numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_uniform_prior_does_not_ask_for_predictions() -> None:
    def predictions() -> Tensor:
        raise AssertionError("a pass over all images")

    prior = ClusterPrior("uniform")
    prior.start(predictions)
    assert prior.uniform and prior.state() == {}


def test_sizes_are_in_the_state() -> None:
    prior, restored = ClusterPrior("estimated"), ClusterPrior("estimated")
    prior.start(lambda: logits_of([[0, 1, 1, 1]], 2))
    restored.load_state(prior.state())
    assert restored.log(torch.zeros(1, 2)).equal(prior.log(torch.zeros(1, 2)))
    with pytest.raises(RuntimeError, match="after start"):
        ClusterPrior("estimated").log(torch.zeros(1, 2))


@pytest.mark.parametrize("kind", [SCANSettings, TURTLESettings])
def test_sizes_that_do_not_fit_are_refused(kind: type[SCANSettings]) -> None:
    kind(prior=(1, 2, 3)).check(3)
    with pytest.raises(ConfigError, match=r"one size for each of the 4 clusters, got 3 sizes"):
        kind(prior=(1, 2, 3)).check(4)
    for wrong in ((1.0, 0.0), (1.0, -2.0), (1.0,), "equal"):
        with pytest.raises(ValidationError, match="prior"):
            kind.model_validate({"prior": wrong})


def test_estimated_sizes_need_a_start() -> None:
    objective = {"kind": "scan", "prior": "estimated"}
    build_config({"clustering": {"objective": objective, "initialize": "kmeans"}})
    with pytest.raises(ConfigError, match=r"initialize=random has none; set initialize=kmeans"):
        build_config({"clustering": {"objective": objective}})


def test_scan_with_a_prior_by_its_definition() -> None:
    torch.manual_seed(1)
    anchors, neighbors, initial = torch.randn(3, 2, 12, 4, dtype=torch.float64).mul(2)
    objective = SCANSettings(entropy_weight=1.5, prior="estimated").build()
    objective.start(lambda: initial)
    log_prior = objective.prior.log(anchors[:, 0])

    def definition(a: Tensor, n: Tensor) -> Tensor:
        p, q = a.softmax(dim=-1), n.softmax(dim=-1)
        mean = p.mean(dim=1)
        agreement = (p * q).sum(dim=-1).log().mean(dim=1)
        return -agreement + 1.5 * (mean * (mean.log() - log_prior)).sum(dim=1)

    own = anchors.float().requires_grad_()
    losses, metrics = objective.loss(lambda x: x, own, neighbors.float())
    exact = anchors.clone().requires_grad_()
    expected = definition(exact, neighbors)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(value.sum(), x)[0].double() for value, x in ((losses, own), (expected, exact))]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert metrics["loss"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    index = torch.tensor([[i] for i in range(12)])  # each image with itself alone
    score = objective.score(anchors, index)
    pairs = -(anchors.softmax(dim=-1).square().sum(dim=-1)).log().mean(dim=1)
    mean = anchors.softmax(dim=-1).mean(dim=1)
    torch.testing.assert_close(score, pairs + (mean * (mean.log() - log_prior)).sum(dim=1), rtol=1e-5, atol=1e-5)


def test_equal_sizes_differ_from_the_uniform_prior_by_a_constant() -> None:
    torch.manual_seed(2)
    anchors, neighbors = torch.randn(2, 3, 20, 5)
    objective = SCANSettings(entropy_weight=2.0, prior=(3, 3, 3, 3, 3)).build()
    objective.start(lambda: anchors)
    losses, _ = objective.loss(lambda x: x, anchors, neighbors)
    total, _, _ = scan_loss(anchors, neighbors, 2.0)
    torch.testing.assert_close(losses, total + 2.0 * float(np.log(5)))


def test_the_score_does_not_reward_balance_if_sizes_are_known() -> None:
    # 8 images of one kind and 2 of another: the true clusters against even ones, which split the large kind.
    true, even = [0] * 8 + [1] * 2, [0] * 5 + [1] * 5
    logits = logits_of([true, even], 2) * 5
    neighbors = torch.tensor([[(i + 1) % 8] for i in range(8)] + [[9], [8]])
    uneven = SCANSettings(prior=(8, 2)).build()
    uneven.start(lambda: logits)
    scores = uneven.score(logits, neighbors)
    assert int(scores.argmin()) == 0
    mean = logits.softmax(dim=-1).mean(dim=1)
    assert SCANSettings().build().prior.entropy(mean).argmax() == 1
