"""SIGReg and VISReg: against their definitions, their gradients, bad input, and several processes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import answers_by_rank
from scipy import integrate, stats
from torch import Tensor, nn
from torch.nn import functional as F

from scan_fast.losses import sigreg_loss, visreg_loss
from scan_fast.ops import reference

Loss = Callable[..., Tensor]
LOSSES: tuple[Loss, ...] = (sigreg_loss, visreg_loss)
DEFINITIONS: dict[Loss, Callable[[Tensor, Tensor], Tensor]] = {
    sigreg_loss: reference.sigreg,
    visreg_loss: reference.visreg,
}

both = pytest.mark.parametrize("loss", LOSSES)


def batch(rows: int, columns: int, count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return embeddings that are neither centred nor of unit scale, and directions of length one."""
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) + 0.3
    directions = F.normalize(torch.randn(count, columns, generator=generator, dtype=torch.float64), dim=1)
    return z.to(dtype), directions.to(dtype)


def test_sigreg_is_the_integral_of_its_definition() -> None:
    z, directions = batch(40, 6, 7, torch.float64)
    projections = (z @ directions.T).numpy()

    def integrand(t: float, column: int) -> float:
        phi = np.exp(1j * t * projections[:, column]).mean()
        return float(math.exp(-t * t / 2) * abs(phi - math.exp(-t * t / 2)) ** 2)

    exact = [integrate.quad(integrand, -3, 3, args=(column,))[0] for column in range(7)]
    assert sigreg_loss(z, directions).item() == pytest.approx(np.mean(exact), rel=0.01)


def test_visreg_is_the_sum_of_its_three_terms() -> None:
    z, directions = batch(50, 6, 7)
    rows = z.double().numpy()
    mean, deviation = rows.mean(axis=0), rows.std(axis=0)
    projections = np.sort((rows - mean) / deviation @ directions.double().numpy().T, axis=0)
    quantiles = stats.norm.ppf(np.arange(1, 51) / 51)
    expected = (mean**2).mean() + ((deviation - 1) ** 2).mean() + ((projections - quantiles[:, None]) ** 2).mean()
    assert visreg_loss(z, directions).item() == pytest.approx(expected, rel=1e-5)


@both
def test_a_normal_distribution_is_nearer_than_others(loss: Loss) -> None:
    torch.manual_seed(0)
    normal, directions = torch.randn(2000, 8), torch.randn(64, 8)
    near = loss(normal, directions).item()
    uneven = torch.cat((normal[:, :4], 0.1 * normal[:, 4:]), dim=1)
    for other in (normal + 1, 2 * normal, uneven, normal.sign(), torch.zeros_like(normal)):
        assert loss(other, directions).item() > 5 * near


def test_visreg_spreads_collapsed_embeddings() -> None:
    z = (1e-3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    visreg_loss(z, torch.eye(8)).backward()
    assert z.grad is not None and z.grad.isfinite().all()
    growth = -(z.detach() * z.grad).sum(dim=0)  # of each dimension, by a step against the gradient
    assert (growth > 0).all()


@both
def test_equal_embeddings_give_no_nan(loss: Loss) -> None:
    z = torch.ones(16, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(z, torch.eye(4)), z)
    assert gradient.isfinite().all()


@both
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(2, 1, 1), (33, 5, 9), (256, 64, 100)])
def test_values_and_gradients_are_those_of_the_reference(loss: Loss, scale: float, shape: tuple[int, int, int]) -> None:
    z, directions = batch(*shape)
    z = (scale * z).requires_grad_()
    exact = z.detach().double().requires_grad_()
    expected = DEFINITIONS[loss](exact, directions.double())
    value = loss(z, directions)
    assert value.dtype == torch.float32 and value.shape == ()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    (gradient,), (exact_gradient,) = torch.autograd.grad(value, z), torch.autograd.grad(expected, exact)
    error = (gradient.double() - exact_gradient).norm()
    assert error <= 1e-4 * exact_gradient.norm() + 1e-7 * scale


@both
def test_float64_gradients_are_finite_differences(loss: Loss) -> None:
    z, directions = batch(7, 3, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: loss(x, directions), z.requires_grad_())
    assert loss(z, directions).dtype == torch.float64


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss: Loss, dtype: torch.dtype) -> None:
    z, directions = batch(64, 8, 16)
    half = z.to(dtype).requires_grad_()
    whole = half.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(half, directions)
    expected = loss(whole, directions)
    assert value.dtype == torch.float32 and value.equal(expected)
    value.backward()
    expected.backward()
    assert half.grad is not None and half.grad.dtype == dtype and whole.grad is not None
    assert half.grad.equal(whole.grad.to(dtype))


@both
def test_any_strides_and_lengths_of_directions(loss: Loss) -> None:
    z, directions = batch(20, 6, 7)
    expected = loss(z, directions)
    torch.testing.assert_close(loss(z.T.contiguous().T, 3 * directions), expected)
    torch.testing.assert_close(loss(torch.stack([z, z], dim=2)[..., 0], directions), expected)
    assert loss(z, directions.requires_grad_()).requires_grad is False


@both
def test_one_nan_is_not_lost(loss: Loss) -> None:
    z, directions = batch(20, 6, 7)
    z[3, 2] = math.nan
    assert loss(z, directions).isnan()


@both
def test_the_same_input_gives_the_same_bits(loss: Loss) -> None:
    z, directions = batch(50, 6, 7)
    assert loss(z, directions).equal(loss(z.clone(), directions.clone()))


@both
def test_transforms_of_the_loss(loss: Loss) -> None:
    """A graph without breaks, forward-mode derivatives, and a second backward pass."""
    z, directions = batch(12, 5, 6)
    z.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z, directions), z)
    compiled: Any = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (again,) = torch.autograd.grad(compiled(z, directions), z)
    torch.testing.assert_close(again, gradient)
    tangent = torch.ones_like(z)
    slope = torch.func.jvp(lambda x: loss(x, directions), (z.detach(),), (tangent,))[1]
    torch.testing.assert_close(slope, (gradient * tangent).sum(), rtol=1e-4, atol=1e-6)
    value = loss(z, directions)
    (first,) = torch.autograd.grad(value, z, retain_graph=True)
    assert torch.autograd.grad(value, z)[0].equal(first)


@both
@pytest.mark.parametrize(
    "z, directions, message",
    [
        ([[1.0]], torch.ones(1, 1), "z must be a tensor, got list"),
        (torch.ones(4), torch.ones(1, 4), r"z must have 2 dimensions \(B, D\), got shape \(4,\)"),
        (torch.ones(4, 2, dtype=torch.int64), torch.ones(1, 2), "z must be float32, .* got torch.int64"),
        (torch.ones(0, 2), torch.ones(1, 2), r"z must have at least two rows, .* got shape \(0, 2\)"),
        (torch.ones(1, 2), torch.ones(1, 2), r"z must have at least two rows, .* got shape \(1, 2\)"),
        (torch.ones(4, 0), torch.ones(1, 0), r"z must have at least one column, got shape \(4, 0\)"),
        (torch.ones(4, 2), torch.ones(0, 2), r"directions must have at least one row and 2 columns.*\(0, 2\)"),
        (torch.ones(4, 2), torch.ones(5, 3), r"directions must have at least one row and 2 columns.*\(5, 3\)"),
        (torch.ones(4, 2), torch.ones(5, 2, device="meta"), "must be on the same device, got cpu and meta"),
    ],
)
def test_wrong_arguments_are_named(loss: Loss, z: Any, directions: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(z, directions)


@both
def test_without_a_process_group_nothing_is_gathered(loss: Loss) -> None:
    z, directions = batch(20, 6, 7)
    assert loss(z, directions, gather_distributed=True).equal(loss(z, directions))


WORLDS: dict[int, list[tuple[tuple[int, ...], int]]] = {2: [((20, 20), 7)], 3: [((9, 1, 30), 8), ((12, 0, 5), 2)]}
"""By number of ranks, cases of rows by rank and number of directions."""


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(5, 6, dtype=torch.float64)


def _one_rank(rank: int, store_path: str, world: int, results: Any) -> None:
    """Run one rank in its own process: put (rank, value and gradients by case and loss, error texts) into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store_path}", rank=rank, world_size=world)
    answers, refusals = [], []
    for counts, count in WORLDS[world]:
        z, directions = batch(sum(counts), 5, count, torch.float64)
        own = z.split(counts)[rank].clone().requires_grad_()
        for loss in LOSSES:
            network = _network()
            spread = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
            value = 3 * loss(network(own), spread, gather_distributed=True)
            value.backward()
            weights = []
            for parameter in network.parameters():  # the mean over ranks, as in DistributedDataParallel
                assert parameter.grad is not None
                dist.all_reduce(parameter.grad)
                weights.append((parameter.grad / world).tolist())
            (gradient,) = torch.autograd.grad(loss(own, directions, gather_distributed=True), own)
            answers.append((value.item(), weights, gradient.tolist()))
    for loss in LOSSES:
        for wrong in (z[:4, : 5 - rank], z[:4].to(torch.float32 if rank else torch.float64), z[: int(rank == 0)]):
            try:
                loss(wrong, directions[:, : wrong.shape[1]], gather_distributed=True)
                refusals.append("nothing was raised")
            except ValueError as error:
                refusals.append(str(error))
    results.put((rank, answers, refusals))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
@pytest.mark.parametrize("world", WORLDS)
def test_ranks_give_the_loss_and_gradient_of_the_whole_batch(world: int, tmp_path: Path) -> None:
    """Even and uneven batches, a rank without rows, and fewer directions than ranks."""
    by_rank = answers_by_rank(_one_rank, tmp_path, world, seconds=300)
    cases = [(*case, loss) for case in WORLDS[world] for loss in LOSSES]
    for number, (counts, count, loss) in enumerate(cases):
        z, directions = batch(sum(counts), 5, count, torch.float64)
        z.requires_grad_()
        spread = torch.randn(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        network = _network()
        value = 3 * loss(network(z), spread)  # the directions of rank 0
        value.backward()
        expected = torch.autograd.grad(loss(z, directions), z)[0].split(counts)
        for rank, answers, _ in by_rank:
            ours, weights, gradient = answers[number]
            assert ours == pytest.approx(value.item(), rel=1e-12)
            for found, parameter in zip(weights, network.parameters(), strict=True):
                torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), parameter.grad)
            # The gradient is that of the sum of all ranks' results.
            rows = torch.tensor(gradient, dtype=torch.float64).reshape(-1, 5) / world
            torch.testing.assert_close(rows, expected[rank])
    for _, _, refusals in by_rank:
        assert len(refusals) == 6
        for width, dtype, few in (refusals[:3], refusals[3:]):
            assert "every rank must pass z of one width" in width and ", 5)" in width and ", 4)" in width
            assert "every rank must pass z of one width" in dtype and "float32" in dtype
            assert "z must have at least two rows" in few
