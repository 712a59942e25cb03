"""The convolution with a gradient of its own: the values of PyTorch's, for every geometry, on every path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from scan_fast.models.convolution import Conv2d, patches

GEOMETRIES = [  # (side, kernel, stride, padding)
    (4, 3, 1, 1),
    (8, 3, 2, 1),
    (8, 1, 2, 0),
    (2, 3, 1, 1),
    (1, 3, 1, 1),
    (5, 3, 2, 1),
    (4, 5, 1, 2),
    (6, 3, 1, 0),
    (32, 3, 1, 1),
]


def gradients(layer: nn.Conv2d, x: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    (out * direction).float().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None
    return out.float(), x.grad, layer.weight.grad


@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), GEOMETRIES)
@pytest.mark.parametrize("channels_last", [True, False])
def test_values_and_gradients(side: int, kernel: int, stride: int, padding: int, channels_last: bool) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    layer = Conv2d(24, 40, kernel, stride=stride, padding=padding, bias=False).to(memory_format=layout)
    x = torch.randn(6, 24, side, side).contiguous(memory_format=layout)
    exact = nn.Conv2d(24, 40, kernel, stride=stride, padding=padding, bias=False).double()
    exact.load_state_dict({"weight": layer.weight.detach().bfloat16()})
    rounded = x.bfloat16().double().requires_grad_()
    out = exact(rounded)
    direction = torch.randn_like(out).bfloat16().float().contiguous(memory_format=layout)
    (out * direction).sum().backward()
    found = gradients(layer, x.bfloat16().float(), direction)
    for number, expected in enumerate((out.detach(), rounded.grad, exact.weight.grad)):
        assert expected is not None
        error = float((found[number].detach() - expected).norm() / expected.norm())
        # Half a unit in the last of bfloat16's eight bits, and a little for the order of the sum.
        if error >= 0.004:
            # Processors without AVX-512 have PyTorch's kernels, which round more often.
            plain = nn.Conv2d(24, 40, kernel, stride=stride, padding=padding, bias=False)
            plain.load_state_dict(layer.state_dict())
            theirs = gradients(plain.to(memory_format=layout), x.bfloat16().float(), direction)[number].detach()
            assert error < 1.01 * float((theirs - expected).norm() / expected.norm()) < 0.006


def test_the_layout_of_gradients_is_that_of_the_weights() -> None:
    layer = Conv2d(8, 16, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 4, 4)
    _, _, grad = gradients(layer, x, torch.ones(2, 16, 4, 4))
    assert grad.dtype == torch.float32
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_without_autocast_it_is_pytorchs_in_every_bit() -> None:
    layer = Conv2d(8, 16, 3, padding=1, bias=False)
    plain = nn.Conv2d(8, 16, 3, padding=1, bias=False)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(4, 8, 4, 4)
    for each in (layer, plain):
        each(x).square().sum().backward()
    assert layer.weight.grad is not None
    assert plain.weight.grad is not None
    assert layer.weight.grad.equal(plain.weight.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert layer(x).equal(plain(x))


def test_a_frozen_input_and_a_frozen_weight() -> None:
    layer = Conv2d(8, 16, 3, padding=1, bias=False)
    x = torch.randn(4, 8, 4, 4)
    frozen = copy.deepcopy(layer).requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().sum().backward()
        through = x.clone().requires_grad_()
        frozen(through).float().sum().backward()
    assert layer.weight.grad is not None
    assert through.grad is not None
    assert frozen.weight.grad is None


def test_patches_are_what_each_position_sees() -> None:
    x = torch.arange(2 * 3 * 5 * 4, dtype=torch.float32).view(2, 3, 5, 4)
    weight = torch.arange(7 * 3 * 3 * 2, dtype=torch.float32).remainder(11).view(7, 3, 3, 2)  # sums are exact
    expected = nn.functional.conv2d(x, weight, stride=(2, 1), padding=(1, 0))
    rows = patches(x, (3, 2), (2, 1), (1, 0))
    found = rows @ weight.permute(0, 2, 3, 1).flatten(1).t()
    torch.testing.assert_close(found, expected.permute(0, 2, 3, 1).flatten(0, 2))
