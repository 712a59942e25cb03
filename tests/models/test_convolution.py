"""The convolution with a gradient of its own: the values of PyTorch's, for every geometry, on every path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from scan_fast.models.convolution import Conv2d, patches
from scan_fast.ops import convolution as ops
from scan_fast.ops import native

needs_native = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")

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


class _Strides(TorchDispatchMode):
    """Notes the stride of each convolution that PyTorch computes or differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            self.seen.append(tuple(args[3]))
        elif func is torch.ops.aten.convolution_backward.default:
            self.seen.append(tuple(args[4]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True])
def test_a_strided_shortcut_of_few_channels_keeps_away_from_the_overrun_in_onednn(autocast: bool) -> None:
    layer = Conv2d(8, 16, 1, stride=2, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(5, 8, 11, 12).contiguous(memory_format=torch.channels_last).requires_grad_()
    with _Strides() as strides, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = layer(x)
        direction = torch.randn_like(out)
        (out * direction).float().sum().backward()
    assert strides.seen == [(1, 1), (1, 1)]
    exact = nn.Conv2d(8, 16, 1, stride=2, bias=False).double()
    exact.load_state_dict(layer.state_dict())
    inner = x.detach().double().requires_grad_()
    (exact(inner) * direction.double()).sum().backward()
    pairs = ((out, exact(inner)), (x.grad, inner.grad), (layer.weight.grad, exact.weight.grad))
    for found, expected in pairs:
        assert found is not None
        assert expected is not None
        error = float((found.double() - expected).norm().detach() / expected.norm().detach())
        assert error < (0.01 if autocast else 1e-6)


@needs_native
@pytest.mark.parametrize(("side", "kernel", "stride", "padding"), GEOMETRIES)
def test_float32_weight_gradient_of_the_kernel(
    monkeypatch: pytest.MonkeyPatch, side: int, kernel: int, stride: int, padding: int
) -> None:
    monkeypatch.setattr(ops, "_is_slow_in_onednn", lambda: True)
    torch.manual_seed(0)
    layer = Conv2d(32, 40, kernel, stride=stride, padding=padding, bias=False).to(memory_format=torch.channels_last)
    exact = nn.Conv2d(32, 40, kernel, stride=stride, padding=padding, bias=False).double()
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(6, 32, side, side).contiguous(memory_format=torch.channels_last).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out, out64 = layer(x), exact(x64)
    assert out.grad_fn is not None
    assert "FloatConvolution" in type(out.grad_fn).__name__
    direction = torch.randn_like(out)
    (out * direction).sum().backward()
    (out64 * direction.double()).sum().backward()
    for found, expected in ((out, out64), (x.grad, x64.grad), (layer.weight.grad, exact.weight.grad)):
        assert found is not None
        assert expected is not None
        assert float((found.detach() - expected.detach()).norm() / expected.detach().norm()) < 1e-6
    assert layer.weight.grad is not None
    assert layer.weight.grad.is_contiguous(memory_format=torch.channels_last)


@needs_native
def test_float32_convolution_is_differentiable_twice_and_without_an_input_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "_is_slow_in_onednn", lambda: True)
    torch.manual_seed(0)
    layer = Conv2d(16, 8, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(16, 8, 3, padding=1, bias=False)
    plain.load_state_dict(layer.state_dict())
    image = torch.randn(2, 16, 5, 5).contiguous(memory_format=torch.channels_last)
    second = []
    for each in (layer, plain):
        x = image.clone(memory_format=torch.preserve_format).requires_grad_()
        (grad,) = torch.autograd.grad(each(x).tanh().sum(), x, create_graph=True)
        second.append(torch.autograd.grad(grad.square().sum(), (x, each.weight)))
    for ours, theirs in zip(*second, strict=True):
        torch.testing.assert_close(ours, theirs)
    (weight_grad,) = torch.autograd.grad(layer(image).sum(), layer.weight)
    torch.testing.assert_close(weight_grad, torch.autograd.grad(plain(image).sum(), plain.weight)[0])


@needs_native
@pytest.mark.parametrize("bfloat16", [False, True])
def test_transforms_of_torch_func(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    monkeypatch.setattr(ops, "_is_slow_in_onednn", lambda: True)
    torch.manual_seed(0)
    layer = Conv2d(32, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    plain = nn.Conv2d(32, 64, 3, padding=1, bias=False)
    plain.load_state_dict(layer.state_dict())
    images = torch.randn(32, 32, 4, 4).contiguous(memory_format=torch.channels_last)
    found = []
    for each in (layer, plain):

        def loss(weight: Tensor, x: Tensor, each: nn.Conv2d = each) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
                return torch.func.functional_call(each, {"weight": weight}, (x,)).float().square().mean()

        weight = layer.weight.detach()
        gradient = torch.func.grad(loss)
        found.append(
            (
                gradient(weight, images),
                torch.func.vmap(gradient, in_dims=(None, 0))(weight, images.unflatten(0, (4, 8))),
                torch.func.jvp(loss, (weight, images), (weight, images))[1],
            )
        )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


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
