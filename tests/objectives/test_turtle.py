"""TURTLE against its formula with probes by torch.optim.Adam, and its score against networkx."""

from __future__ import annotations

import networkx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scan_fast.evaluation.model_selection import modularity
from scan_fast.models.heads import ClusterModel
from scan_fast.objectives import TURTLESettings
from scan_fast.objectives.prior import Prior
from scan_fast.objectives.turtle import probe_log_probabilities


def slow_probe(features: Tensor, labels: Tensor, steps: int, lr: float) -> Tensor:
    """Return what :func:`probe_log_probabilities` returns, from modules, autograd and PyTorch's Adam."""
    inputs = features.double() - features.double().mean(dim=0)
    inputs = inputs / inputs.square().mean().sqrt()
    found = []
    for targets in labels.double():
        probe = nn.Linear(inputs.shape[1], targets.shape[1]).double()
        nn.init.zeros_(probe.weight)
        nn.init.zeros_(probe.bias)
        optimizer = torch.optim.Adam(probe.parameters(), lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(probe(inputs), targets).backward()
            optimizer.step()
        found.append(probe(inputs).detach().log_softmax(dim=-1))
    return torch.stack(found)


@pytest.mark.parametrize(("steps", "lr"), [(1, 0.1), (10, 1e-3), (25, 0.05)])
def test_probes_are_those_of_adam(steps: int, lr: float) -> None:
    torch.manual_seed(0)
    features = 5 * torch.randn(30, 7) + 100
    labels = torch.randn(2, 30, 4).mul(2).softmax(dim=-1)
    expected = slow_probe(features, labels, steps, lr)
    torch.testing.assert_close(probe_log_probabilities(features.double(), labels.double(), steps, lr), expected)
    # In float32, Adam's first steps are the signs of gradients, some of which are near zero.
    found = probe_log_probabilities(features, labels, steps, lr)
    torch.testing.assert_close(found.double(), expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("prior", ["uniform", (4, 2, 1, 1)])
def test_loss_and_gradient_by_the_definition(prior: Prior) -> None:
    torch.manual_seed(1)
    features, initial = torch.randn(20, 6, dtype=torch.float64), torch.randn(2, 20, 4, dtype=torch.float64)
    objective = TURTLESettings(entropy_weight=3.0, inner_lr=0.05, prior=prior).build()
    objective.start(lambda: initial)
    weight = torch.randn(2, 4, 6, dtype=torch.float64)

    def heads(x: Tensor, weight: Tensor = weight) -> Tensor:
        return torch.einsum("bd,hcd->hbc", x, weight)

    log_q = slow_probe(features, heads(features).softmax(dim=-1), 10, 0.05)

    def definition(weight: Tensor) -> Tensor:
        labels = heads(features, weight).softmax(dim=-1)
        mean = labels.mean(dim=1)
        log_prior = 0.0 if prior == "uniform" else objective.prior.log(mean)
        spread = (mean * (mean.log() - log_prior)).sum(dim=1)
        return -(labels * log_q).sum(dim=2).mean(dim=1) + 3.0 * spread

    trained = weight.clone().requires_grad_()
    losses, metrics = objective.loss(lambda x: heads(x, trained), features, features.flip(0))
    torch.testing.assert_close(losses, definition(weight))
    assert metrics["loss"].item() == pytest.approx(definition(weight).mean().item())
    (gradient,) = torch.autograd.grad(losses.sum(), trained)
    step, numeric = 1e-6, torch.zeros_like(weight)
    for index in range(weight.numel()):
        change = torch.zeros(weight.numel(), dtype=torch.float64)
        change[index] = step
        change = change.view_as(weight)
        difference = definition(weight + change) - definition(weight - change)
        numeric.view(-1)[index] = difference.sum() / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-5, atol=1e-7)


def test_features_learn_through_the_labels_alone() -> None:
    torch.manual_seed(2)
    features = torch.randn(10, 6, requires_grad=True)
    model = ClusterModel.linear(6, 3, 1)
    losses, _ = TURTLESettings().build().loss(lambda x: model.heads(x).detach(), features, features)
    assert not losses.requires_grad
    losses, _ = TURTLESettings().build().loss(model.heads, features, features)
    losses.sum().backward()
    assert features.grad is not None and features.grad.abs().sum() > 0


def test_extreme_and_constant_features_stay_finite() -> None:
    torch.manual_seed(3)
    model = ClusterModel.linear(6, 4, 2)
    objective = TURTLESettings(inner_lr=1.0).build()
    for features in (torch.randn(16, 6) * 1e6, torch.ones(16, 6), torch.zeros(16, 6)):
        losses, _ = objective.loss(model.heads, features, features)
        model.zero_grad()
        losses.sum().backward()
        assert losses.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probes_are_trained_in_float32_under_autocast(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    features = torch.randn(24, 6)
    logits = torch.randn(2, 24, 3).to(dtype)
    objective = TURTLESettings(inner_lr=0.05).build()
    with torch.autocast("cpu", dtype=dtype):
        losses, _ = objective.loss(lambda _: logits, features, features)
    expected, _ = objective.loss(lambda _: logits.float(), features, features)
    assert losses.dtype == torch.float32 and losses.equal(expected)


def test_modularity_is_that_of_networkx() -> None:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 4, (3, 30), generator=generator)
    labels[2] = 0
    neighbors = torch.stack([torch.randperm(29, generator=generator)[:3] for _ in range(30)])
    neighbors += (neighbors >= torch.arange(30)[:, None]).long()  # not the image itself
    neighbors[::4, 1:] = -1
    graph = networkx.MultiGraph()
    graph.add_nodes_from(range(30))
    graph.add_edges_from((i, int(j)) for i, row in enumerate(neighbors) for j in row if j >= 0)
    expected = [
        networkx.community.modularity(graph, [set((row == c).nonzero().flatten().tolist()) for c in range(4)])
        for row in labels
    ]
    found = modularity(labels, neighbors, 4)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert float(found[2]) == pytest.approx(0, abs=1e-12)
    logits = torch.nn.functional.one_hot(labels, 4).float()
    assert TURTLESettings().build().score(logits, neighbors).equal(-found)
