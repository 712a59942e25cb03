"""SIGReg and VISReg: their measures against the definitions, training, and resuming in the same bits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.nn import functional as F

from scan_fast.methods.gaussian import Directions, view_distance
from scan_fast.methods.sigreg import sigreg
from scan_fast.methods.visreg import visreg


def test_sigreg_is_the_integral_of_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(40, 6, generator=generator) + 0.3
    directions = F.normalize(torch.randn(7, 6, generator=generator), dim=1)
    projections = (z.double() @ directions.double().T).numpy()

    def integrand(t: float, column: int) -> float:
        phi = np.exp(1j * t * projections[:, column]).mean()
        return float(math.exp(-t * t / 2) * abs(phi - math.exp(-t * t / 2)) ** 2)

    exact = [integrate.quad(integrand, -3, 3, args=(column,))[0] for column in range(7)]
    assert sigreg(z, directions).item() == pytest.approx(np.mean(exact), rel=0.01)


def test_visreg_is_the_sum_of_its_three_terms() -> None:
    generator = torch.Generator().manual_seed(0)
    z = (1.5 * torch.randn(50, 6, generator=generator) + 0.3).double().numpy()
    directions = F.normalize(torch.randn(7, 6, generator=generator), dim=1)
    mean, deviation = z.mean(axis=0), z.std(axis=0)
    projections = np.sort((z - mean) / deviation @ directions.double().numpy().T, axis=0)
    quantiles = stats.norm.ppf(np.arange(1, 51) / 51)
    expected = (mean**2).mean() + ((deviation - 1) ** 2).mean() + ((projections - quantiles[:, None]) ** 2).mean()
    assert visreg(torch.from_numpy(z).float(), directions).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("measure", [sigreg, visreg])
def test_a_normal_distribution_is_nearer_than_others(measure: object) -> None:
    assert callable(measure)
    torch.manual_seed(0)
    normal, directions = torch.randn(2000, 8), F.normalize(torch.randn(64, 8), dim=1)
    near = measure(normal, directions).item()
    uneven = torch.cat((normal[:, :4], 0.1 * normal[:, 4:]), dim=1)
    for other in (normal + 1, 2 * normal, uneven, normal.sign(), torch.zeros_like(normal)):
        assert measure(other, directions).item() > 5 * near


def test_visreg_spreads_collapsed_embeddings() -> None:
    z = (1e-3 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))).requires_grad_()
    visreg(z, torch.eye(8)).backward()
    assert z.grad is not None and z.grad.isfinite().all()
    growth = -(z.detach() * z.grad).sum(dim=0)  # of each dimension, by a step against the gradient
    assert (growth > 0).all()


def test_equal_embeddings_give_no_nan() -> None:
    z = torch.ones(16, 4, requires_grad=True)
    for measure in (sigreg, visreg):
        (gradient,) = torch.autograd.grad(measure(z, torch.eye(4)), z)
        assert gradient.isfinite().all()


def test_views_are_compared_with_the_mean_of_the_large_ones() -> None:
    a, b, small = torch.zeros(3, 2), torch.full((3, 2), 2.0), torch.full((3, 2), 4.0)
    assert view_distance([a, b]).item() == 1.0
    assert view_distance([a, b, small]).item() == pytest.approx((1 + 1 + 9) / 3)


def test_directions_follow_from_their_state() -> None:
    torch.manual_seed(0)
    directions = Directions(33, torch.device("cpu"))
    first = directions.draw(10)
    assert first.shape == (33, 10)
    torch.testing.assert_close(first.norm(dim=1), torch.ones(33))
    assert directions.draw(10).equal(first)
    directions.advance()
    second = directions.draw(10)
    assert not second.equal(first)
    torch.manual_seed(1)
    other = Directions(33, torch.device("cpu"))
    assert not other.draw(10).equal(first)
    other.load_state(directions.state())
    assert other.draw(10).equal(second)


def test_directions_are_evenly_spread() -> None:
    torch.manual_seed(0)
    rows = Directions(20_000, torch.device("cpu")).draw(5)
    torch.testing.assert_close(rows.mean(dim=0), torch.zeros(5), atol=0.02, rtol=0)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(5) / 5, atol=0.01, rtol=0)
