"""Muon: its update by the definition, which weights are its own, and that it resumes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from interruptions import InterruptedPretext
from pretext_training import trained
from torch import Tensor, nn

from scan_fast.methods import PretextMethod
from scan_fast.models.heads import PretextModel
from scan_fast.runs.config import OptimizerConfig
from scan_fast.stages.pretext import Pretext
from scan_fast.training.context import Context
from scan_fast.training.optimizers import (
    RMS,
    Muon,
    Together,
    build_optimizer,
    is_hidden,
    orthogonal,
    write_learning_rate,
)


@pytest.mark.parametrize("shape", [(16, 16), (12, 40), (40, 12), (1, 30)])
def test_updates_have_singular_values_near_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    (result,) = orthogonal([matrix])
    assert result.shape == shape
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    # The same singular vectors, in the order of the values.
    values = torch.diagonal(u.mT @ result @ v.mT)
    torch.testing.assert_close(u @ torch.diag(values) @ v, result, atol=1e-6, rtol=0)
    assert values.min() > 0.5 and values.max() < 1.3
    assert orthogonal([torch.zeros(shape)])[0].count_nonzero() == 0


@pytest.mark.parametrize("shape", [(12, 40), (40, 12)])
def test_the_iteration_on_the_gram_matrix_is_the_published_one(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape, dtype=torch.float64)
    a, b, c = 3.4445, -4.7750, 2.0315
    expected = matrix / torch.linalg.matrix_norm(matrix)
    for _ in range(5):
        gram = expected @ expected.mT
        expected = a * expected + b * gram @ expected + c * gram @ gram @ expected
    # 1e-7 keeps from a division by zero.
    torch.testing.assert_close(orthogonal([matrix])[0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonal([matrix.float()])[0].double(), expected, atol=1e-4, rtol=0)
    assert orthogonal([matrix], 0)[0].norm() == pytest.approx(1)


def test_scaling_a_gradient_changes_nothing() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(8, 24)
    torch.testing.assert_close(orthogonal([1e4 * matrix]), orthogonal([matrix]), atol=1e-4, rtol=1e-3)


def test_matrices_of_as_many_rows_are_iterated_together() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((8, 24), (30, 12), (24, 8), (8, 8), (12, 12), (8, 24))]
    together, alone = orthogonal(matrices), [orthogonal([matrix])[0] for matrix in matrices]
    assert [x.shape for x in together] == [matrix.shape for matrix in matrices]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    assert orthogonal([]) == []


def test_steps_of_several_weights_are_those_of_each() -> None:
    torch.manual_seed(0)
    several = [nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (16, 8, 3, 3), (24, 8))]
    single = [nn.Parameter(weight.detach().clone()) for weight in several]
    optimizers = [
        Muon(several, lr=0.1, weight_decay=0.1),
        *(Muon([weight], lr=0.1, weight_decay=0.1) for weight in single),
    ]
    for _ in range(2):
        for weight, other in zip(several, single, strict=True):
            weight.grad = torch.randn(weight.shape)
            other.grad = weight.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close([w.detach() for w in several], [w.detach() for w in single], atol=1e-5, rtol=1e-4)


def test_steps_are_the_orthogonal_moving_average() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 4, 3, 3))
    optimizer = Muon([weight], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, average = weight.detach().clone(), torch.zeros(8, 36)
    for _ in range(3):
        gradient = torch.randn(8, 4, 3, 3)
        weight.grad = gradient
        optimizer.step()
        average = 0.9 * average + 0.1 * gradient.flatten(1)
        nesterov = 0.9 * average + 0.1 * gradient.flatten(1)
        step = orthogonal([nesterov])[0].view(8, 4, 3, 3) * RMS * 6  # the larger side is 36
        expected = expected * (1 - 0.1 * 0.5) - 0.1 * step
    torch.testing.assert_close(weight.detach(), expected)
    # As large as a step of Adam, about.
    assert 0.1 < float(step.square().mean().sqrt()) < 0.3


def test_tall_and_channels_last_weights_are_updated() -> None:
    torch.manual_seed(0)
    gradient = torch.randn(40, 12, 1, 1)
    weights = [nn.Parameter(torch.zeros(40, 12)), nn.Parameter(torch.zeros(40, 12, 1, 1))]
    weights[1].data = weights[1].data.contiguous(memory_format=torch.channels_last)
    for weight in weights:
        weight.grad = gradient.view(weight.shape)
        Muon([weight], lr=0.1, momentum=0).step()
        expected = -0.1 * RMS * 40**0.5 * orthogonal([gradient.flatten(1)])[0]
        torch.testing.assert_close(weight.detach().flatten(1), expected)


def test_a_weight_without_gradient_stays() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    before = weight.detach().clone()
    Muon([weight], lr=0.1).step()
    assert weight.equal(before)


def test_vectors_are_refused_by_muon() -> None:
    with pytest.raises(ValueError, match=r"two dimensions or more, got \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))], lr=0.1)


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 5))


def test_hidden_weights_are_muons_and_the_others_adams() -> None:
    model = network()
    named = dict(model.named_parameters())
    assert [name for name, parameter in named.items() if is_hidden(parameter)] == ["2.weight"]
    optimizer = build_optimizer(list(named.values()), OptimizerConfig(name="muon", lr=0.01, decay_all=False))
    assert isinstance(optimizer, Together)
    muon, adam = optimizer.optimizers
    assert isinstance(muon, Muon)
    assert isinstance(adam, torch.optim.AdamW)
    taken = [parameter for part in (muon, adam) for group in part.param_groups for parameter in group["params"]]
    assert sorted(map(id, taken)) == sorted(map(id, named.values()))
    assert [group["weight_decay"] for group in adam.param_groups] == [1e-4, 0.0]
    write_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5, 0.5]


def test_networks_of_one_kind_need_one_optimizer() -> None:
    hidden, vector = nn.Parameter(torch.zeros(8, 8)), nn.Parameter(torch.zeros(8))
    assert isinstance(build_optimizer([hidden], OptimizerConfig(name="muon")), Muon)
    assert isinstance(build_optimizer([vector], OptimizerConfig(name="muon")), torch.optim.AdamW)


def test_muon_goes_on_from_its_state() -> None:
    torch.manual_seed(0)
    model = network()
    images = torch.randn(4, 3, 5, 5)

    def steps(
        model: nn.Module, state: dict[str, object] | None, count: int
    ) -> tuple[dict[str, Tensor], dict[str, object]]:
        optimizer = build_optimizer(list(model.parameters()), OptimizerConfig(name="muon", lr=0.01))
        if state is not None:
            optimizer.load_state_dict(copy.deepcopy(state))
        for _ in range(count):
            optimizer.zero_grad(set_to_none=True)
            model(images).square().sum().backward()
            optimizer.step()
        return model.state_dict(), optimizer.state_dict()

    whole, _ = steps(copy.deepcopy(model), None, 4)
    part = copy.deepcopy(model)
    _, state = steps(part, None, 2)
    resumed, _ = steps(part, state, 2)
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def test_a_pretext_with_muon_resumes_in_the_same_bits(tmp_path: Path) -> None:
    def result_of(folder: Path, stages: Sequence[type[Pretext]]) -> dict[str, Tensor]:
        def build(context: Context, model: PretextModel) -> PretextMethod:
            return context.config.pretext.method.build(model, context.side)

        return trained(folder, stages, build, "pretext.optimizer.name=muon")[0].state_dict()

    whole, parts = (
        result_of(tmp_path / "whole", [Pretext]),
        result_of(tmp_path / "parts", [InterruptedPretext, Pretext]),
    )
    assert all(value.equal(parts[name]) for name, value in whole.items())
