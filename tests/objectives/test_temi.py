"""TEMI against a slow float64 form of its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from scan_fast.models.heads import ClusterModel
from scan_fast.objectives import TEMI, TEMISettings

Array = NDArray[np.float64]


def softmax(logits: Tensor) -> Array:
    values = logits.detach().double().numpy()
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def slow_loss(students: list[Array], teachers: list[Array], marginal: Array, beta: float, weighted: bool) -> Array:
    """Return the loss of each head by loops over heads, images and clusters."""
    heads, rows, clusters = students[0].shape
    losses = np.zeros(heads)
    for b in range(rows):
        same = np.mean(
            [sum(teachers[0][h, b, c] * teachers[1][h, b, c] for c in range(clusters)) for h in range(heads)]
        )
        for h in range(heads):
            for student, teacher in ((students[0], teachers[1]), (students[1], teachers[0])):
                inner = sum((student[h, b, c] * teacher[h, b, c]) ** beta / marginal[h, c] for c in range(clusters))
                losses[h] -= (same if weighted else 1.0) * math.log(inner) / (2 * rows)
    return losses


def attached(settings: TEMISettings, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[TEMI, ClusterModel]:
    torch.manual_seed(seed)
    model = ClusterModel.linear(6, 4, 3).to(dtype)
    objective = settings.build()
    objective.attach(model)
    return objective, model


@pytest.mark.parametrize(("beta", "weighted"), [(0.6, True), (1.0, True), (0.8, False)])
def test_two_steps_by_the_definition(beta: float, weighted: bool) -> None:
    objective, model = attached(TEMISettings(beta=beta, decay=0.7, marginal_decay=0.6, weighted=weighted))
    batches = 3 * torch.randn(2, 2, 8, 6, dtype=torch.float64)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    marginal: Array | None = None
    for anchors, neighbors in batches:
        losses, metrics = objective.loss(model.heads, anchors, neighbors)
        students = [softmax(model.heads(x)) for x in (anchors, neighbors)]
        weight, bias = (torch.stack([average[f"cluster_head.{h}.{n}"] for h in range(3)]) for n in ("weight", "bias"))
        teachers = [softmax(torch.einsum("bd,hcd->hbc", x, weight) + bias[:, None]) for x in (anchors, neighbors)]
        mean = (teachers[0].mean(axis=1) + teachers[1].mean(axis=1)) / 2
        marginal = mean if marginal is None else 0.6 * marginal + 0.4 * mean
        expected = slow_loss(students, teachers, marginal, beta, weighted)
        np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-10)
        assert metrics["loss"].item() == pytest.approx(expected.mean())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        objective.after_step()
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in model.state_dict().items()}


def test_gradient_by_finite_differences() -> None:
    objective, model = attached(TEMISettings(marginal_decay=0.0))
    anchors, neighbors = torch.randn(2, 5, 6, dtype=torch.float64)

    def loss(weight: Tensor) -> Tensor:
        losses, _ = objective.loss(lambda x: torch.einsum("bd,hcd->hbc", x, weight), anchors, neighbors)
        return losses.sum()

    weight = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, (weight,))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_score_is_the_loss_of_held_out_pairs() -> None:
    objective, model = attached(TEMISettings(beta=0.7))
    objective.loss(model.heads, *torch.randn(2, 5, 6, dtype=torch.float64))
    marginal = objective.log_marginal().exp().numpy()
    logits = 4 * torch.randn(3, 7, 4, dtype=torch.float64)
    neighbors = torch.tensor([[1, 2], [0, -1], [3, 4], [-1, -1], [5, 6], [6, 0], [2, 1]])
    pairs = [(i, int(j)) for i, row in enumerate(neighbors) for j in row if j >= 0]
    p = softmax(logits)
    own, others = p[:, [i for i, _ in pairs]], p[:, [j for _, j in pairs]]
    expected = slow_loss([own, others], [own, others], marginal, 0.7, True)
    np.testing.assert_allclose(objective.score(logits, neighbors).numpy(), expected, rtol=1e-9)


def test_the_score_prefers_the_head_whose_neighbours_agree() -> None:
    objective, _ = attached(TEMISettings())
    labels = torch.arange(40) % 4
    neighbors = torch.stack([(torch.arange(40) + 4) % 40, (torch.arange(40) + 8) % 40], dim=1)
    wrong = torch.randperm(40, generator=torch.Generator().manual_seed(0)) % 4
    one = torch.zeros(40, dtype=torch.int64)
    logits = 6 * torch.nn.functional.one_hot(torch.stack([wrong, labels, one]), 4).double()
    objective.load_state({**objective.state(), "marginal": logits.softmax(dim=-1).mean(dim=1)})
    scores = objective.score(logits, neighbors)
    # A single cluster agrees as often, but its pairs say less.
    assert scores[1] < scores[2] < scores[0]


def test_extreme_logits_stay_finite() -> None:
    objective, model = attached(TEMISettings(), dtype=torch.float32)
    features = torch.randn(2, 16, 6) * 1e4
    losses, _ = objective.loss(model.heads, *features)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    logits = torch.full((3, 16, 4), -1e30)
    logits[:, :, 1] = 1e30
    assert objective.score(logits, torch.arange(16)[:, None]).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_the_loss_in_float32(dtype: torch.dtype) -> None:
    objective, model = attached(TEMISettings(), dtype=torch.float32)
    features = torch.randn(2, 32, 6)
    with torch.autocast("cpu", dtype=dtype):
        losses, _ = objective.loss(model.heads, *features)
    rounded = [model.to(dtype).heads(x.to(dtype)).float() for x in features]
    students = [softmax(x) for x in rounded]
    marginal = (students[0].mean(axis=1) + students[1].mean(axis=1)) / 2
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(
        losses.detach().numpy(), slow_loss(students, students, marginal, 0.6, True), rtol=2e-3, atol=2e-3
    )


def test_the_teacher_holds_heads_only_and_is_in_the_state() -> None:
    objective, model = attached(TEMISettings())
    objective.loss(model.heads, *torch.randn(2, 5, 6, dtype=torch.float64))
    state = objective.state()
    assert set(state["teacher"]) == set(model.state_dict())
    other, _ = attached(TEMISettings(), seed=1)
    other.load_state(state)
    batch = torch.randn(2, 5, 6, dtype=torch.float64)
    assert other.loss(model.heads, *batch)[0].equal(objective.loss(model.heads, *batch)[0])


def test_the_mean_is_unknown_before_the_first_step() -> None:
    objective, _ = attached(TEMISettings())
    with pytest.raises(RuntimeError, match="after the first step"):
        objective.score(torch.zeros(3, 2, 4), torch.tensor([[1], [0]]))
