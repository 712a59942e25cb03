"""SIGReg and VISReg: the distance of views, and the directions."""

from __future__ import annotations

import pytest
import torch

from scan_fast.methods.gaussian import Directions, view_distance


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
