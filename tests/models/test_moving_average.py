"""The moving average against its definition."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from scan_fast.models.moving_average import MovingAverage


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_it_follows_the_definition(buffers: Literal["average", "keep"]) -> None:
    model = network()
    average = MovingAverage(model, 0.9, buffers=buffers)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = {name for name, _ in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 3)).square().mean().backward()
        optimizer.step()
        average.update()
        for name, value in model.state_dict().items():
            if name in parameters or (buffers == "average" and value.is_floating_point()):
                expected[name] = 0.9 * expected[name] + 0.1 * value
            elif buffers == "average":
                expected[name] = value.clone()
    for name, value in average.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    assert not average.model.training and all(not p.requires_grad for p in average.model.parameters())
    average.write_back()
    for name, value in model.state_dict().items():
        assert value.equal(average.state_dict()[name]), name


def test_it_goes_on_from_a_checkpoint() -> None:
    model = network()
    average = MovingAverage(model, 0.5)
    linear = model[0]
    assert isinstance(linear, nn.Linear)
    with torch.no_grad():
        linear.weight.add_(1)
    average.update()
    other = MovingAverage(model, 0.5)
    other.load_state_dict({name: value.clone() for name, value in average.state_dict().items()})
    average.update()
    other.update()
    assert all(value.equal(average.state_dict()[name]) for name, value in other.state_dict().items())


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, 2.0, float("nan")])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="decay must be between 0 and 1, got"):
        MovingAverage(network(), decay)
