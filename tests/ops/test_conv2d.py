"""bfloat16 convolutions of a CPU against float64 convolutions of the same rounded values."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import grad as conv2d_gradients

from scan_fast.models import convolution
from scan_fast.models.backbones import BasicBlock
from scan_fast.models.convolution import Conv2d
from scan_fast.ops import native
from scan_fast.ops.convolution import conv2d, conv2d_fork, is_usable, pays

pytestmark = pytest.mark.skipif(not is_usable("cpu"), reason="this CPU has neither AMX nor AVX-512-BF16")

CASES = [  # (batch, in channels, out channels, height, width, kernel, stride, padding)
    (32, 64, 64, 32, 32, 3, 1, 1),
    (40, 64, 128, 32, 32, 3, 2, 1),
    (40, 64, 128, 32, 32, 1, 2, 0),
    (64, 256, 512, 8, 8, 3, 2, 1),
    (70, 512, 512, 4, 4, 3, 1, 1),
    (2, 32, 32, 8, 8, 3, 1, 1),
    (3, 64, 96, 7, 5, 3, 1, 1),
    (33, 32, 64, 9, 9, 3, 2, 1),
    (1, 96, 160, 6, 11, 5, 2, 2),
    (4, 32, 64, 5, 5, 3, 3, 1),
    (17, 64, 32, 3, 3, 3, 1, 1),
    (1, 32, 32, 1, 1, 1, 1, 0),
    (2, 32, 32, 2, 1, 3, 2, 1),
    (2, 32, 32, 7, 7, 3, 1, 0),
    (2, 32, 64, 12, 20, 7, 2, 3),
    (2, 32, 32, 10, 10, 2, 4, 0),
    (2, 32, 32, 9, 33, 1, 3, 0),
    (1, 1024, 32, 2, 2, 1, 1, 0),
]


def images(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def weights(out_channels: int, in_channels: int, kernel: int) -> Tensor:
    scale = (in_channels * kernel**2) ** -0.5
    weight = scale * torch.randn(out_channels, in_channels, kernel, kernel)
    return weight.contiguous(memory_format=torch.channels_last)


def exact(x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs and the result of the float64 convolution of the rounded values."""
    x64, weight64 = x.double().requires_grad_(), weight.bfloat16().double().requires_grad_()
    return x64, weight64, F.conv2d(x64, weight64, stride=stride, padding=padding)


def assert_rounded(found: Tensor, expected: Tensor, terms: Tensor, unit: float) -> None:
    """Check each element to half a unit in the last place of its dtype, plus the rounding of float32 sums."""
    bound = 0.501 * unit * expected.abs() + 2e-6 * terms + 1e-30
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, ...]) -> None:
    batch, in_channels, out_channels, height, width, kernel, stride, padding = case
    torch.manual_seed(0)
    x, weight = images(batch, in_channels, height, width), weights(out_channels, in_channels, kernel)
    x64, weight64, y64 = exact(x, weight, stride, padding)
    grad = images(*y64.shape)
    grads = torch.autograd.grad(y64, (x64, weight64), grad.double())
    sizes = tuple(weight.shape)
    terms = (
        F.conv2d(x64.detach().abs(), weight64.detach().abs(), stride=stride, padding=padding),
        conv2d_gradients.conv2d_input(x.shape, weight64.detach().abs(), grad.double().abs(), stride, padding),
        conv2d_gradients.conv2d_weight(x64.detach().abs(), sizes, grad.double().abs(), stride, padding),
    )
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = conv2d(*leaves, stride, padding)
    found = torch.autograd.grad(y, leaves, grad)
    assert y.dtype == found[0].dtype == torch.bfloat16
    assert found[1].dtype == torch.float32
    for tensor in (y, *found):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
    for value, expected, size, unit in zip(
        (y.detach(), *found), (y64.detach(), *grads), terms, (2.0**-7, 2.0**-7, 2.0**-23), strict=True
    ):
        assert_rounded(value, expected, size, unit)


@settings(deadline=None, max_examples=30)
@given(
    batch=st.integers(1, 40),
    channels=st.tuples(st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 288])),
    side=st.tuples(st.integers(1, 18), st.integers(1, 18)),
    kernel=st.integers(1, 7),
    stride=st.integers(1, 4),
    data=st.data(),
)
def test_any_geometry(
    batch: int, channels: tuple[int, int], side: tuple[int, int], kernel: int, stride: int, data: st.DataObject
) -> None:
    padding = data.draw(st.integers(0, kernel - 1))
    if min(side) + 2 * padding < kernel:
        return
    torch.manual_seed(batch)
    x, weight = images(batch, channels[0], *side), weights(channels[1], channels[0], kernel)
    x64, weight64, y64 = exact(x, weight, stride, padding)
    grad = images(*y64.shape)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = conv2d(*leaves, stride, padding)
    found = torch.autograd.grad(y, leaves, grad)
    for value, expected in zip(
        (y, *found), (y64, *torch.autograd.grad(y64, (x64, weight64), grad.double())), strict=True
    ):
        error = (value.detach().double() - expected.detach()).norm()
        assert float(error) <= 0.004 * float(expected.detach().norm())


def test_non_finite_values_do_not_spread() -> None:
    x, weight = images(33, 32, 6, 6), weights(64, 32, 3)
    x[32, 5, 2, 3] = torch.inf
    x[4, 1, 0, 0] = torch.nan
    y = conv2d(x, weight, 1, 1)
    expected = F.conv2d(x.float(), weight.bfloat16().float(), padding=1)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isnan(), expected.isnan())


def test_a_large_result_has_the_bits_of_its_parts() -> None:
    # From 64 MiB on, results may be written around the caches.
    x, weight = images(1200, 32, 32, 32), weights(32, 32, 1)
    whole = conv2d(x, weight)
    assert whole.numel() * whole.element_size() > 64 << 20
    assert torch.equal(whole, torch.cat([conv2d(part, weight) for part in x.split(480)]))


@pytest.mark.skipif(not native.build_info().get("cpu_amx_bf16"), reason="without AMX, all tests here run in vectors")
def test_the_same_in_vectors() -> None:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    env = {**os.environ, "SCAN_FAST_CPU_ISA": "avx512", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > len(CASES), done.stdout


def test_the_same_bits_for_any_number_of_threads() -> None:
    x, weight = images(70, 64, 16, 16), weights(96, 64, 3)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = conv2d(*leaves, 1, 1)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, y.detach())))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("used", ["both", "result", "images"])
def test_a_fork_adds_both_gradients(used: str) -> None:
    torch.manual_seed(0)
    x, weight = images(32, 32, 8, 8), weights(64, 32, 3)
    leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y, around = conv2d_fork(*leaves, 2, 1)
    assert torch.equal(around, x)
    assert around.data_ptr() == leaves[0].data_ptr()
    first, second = images(*y.shape), images(*x.shape)
    loss = sum(
        (
            (value * direction).float().sum()
            for value, direction, name in ((y, first, "result"), (around, second, "images"))
            if used in ("both", name)
        ),
        torch.zeros(()),
    )
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    x64, weight64, y64 = exact(x, weight, 2, 1)
    grads = torch.autograd.grad(y64, (x64, weight64), first.double())
    expected = torch.zeros_like(x64) if used == "images" else grads[0]
    expected = expected if used == "result" else expected + second.double()
    assert found[0] is not None
    assert float((found[0].double() - expected).norm() / expected.norm()) < 0.003
    if used == "images":
        assert found[1] is None
    else:
        assert found[1] is not None
        assert float((found[1].double() - grads[1]).norm() / grads[1].norm()) < 1e-6


def test_without_gradients_a_fork_returns_its_images() -> None:
    x, weight = images(32, 32, 4, 4), weights(32, 32, 1)
    y, around = conv2d_fork(x, weight)
    assert around is x or around.data_ptr() == x.data_ptr()
    assert torch.equal(y, conv2d(x, weight))


def test_gradients_of_some_inputs_and_double_backward() -> None:
    x, weight = images(32, 32, 4, 4), weights(32, 32, 3).requires_grad_()
    y = conv2d(x, weight, 1, 1)
    y.float().sum().backward(retain_graph=True)
    assert weight.grad is not None
    first = weight.grad.clone()
    y.float().sum().backward()
    assert torch.equal(weight.grad, 2 * first)
    frozen = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(conv2d(frozen, weight.detach(), 1, 1).float().sum(), frozen, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        grad.float().sum().backward()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (images(2, 16, 4, 4), weights(32, 16, 3), "multiples of 32"),
        (images(2, 32, 4, 4), weights(32, 64, 3), "got shapes"),
        (images(2, 32, 4, 4).float(), weights(32, 32, 3), "x must be bfloat16"),
        (images(2, 32, 4, 4).contiguous(), weights(32, 32, 3), "channels-last"),
        (images(2, 32, 4, 4), weights(32, 32, 3).bfloat16(), "weight must be float32"),
        (images(2, 32, 4, 4), weights(32, 32, 3).contiguous(), "weight must be float32 in channels-last"),
        (images(2, 32, 4, 4), weights(32, 32, 1), "no kernel for shapes"),
        (images(2, 32, 1, 1), weights(32, 32, 5), "the kernel must not be larger than the padded image"),
    ],
)
def test_wrong_operands_raise(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv2d(x, weight, 1, 1)


def test_operands_for_which_the_kernel_does_not_pay() -> None:
    weight = weights(64, 32, 3)
    assert pays(images(64, 32, 4, 4), weight, 1, 1)
    assert not pays(images(2, 32, 4, 4), weight, 1, 1)  # most of a block would be empty
    assert not pays(images(64, 48, 4, 4), weights(64, 48, 3), 1, 1)
    assert not pays(images(64, 32, 4, 4), weight.contiguous(), 1, 1)
    assert not pays(images(64, 32, 4, 4), weight.bfloat16(), 1, 1)


def test_operators_pass_opcheck() -> None:
    x, weight = images(3, 32, 5, 4), weights(64, 32, 3)
    y = conv2d(x, weight, 2, 1)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.scan_fast.conv2d_forward.default, (x, weight, 2, 1), test_utils=checks)
    for addend in (None, x):
        torch.library.opcheck(
            torch.ops.scan_fast.conv2d_grad_input.default, (y, weight, addend, list(x.shape), 2, 1), test_utils=checks
        )
    torch.library.opcheck(torch.ops.scan_fast.conv2d_grad_weight.default, (y, x, 3, 2, 1), test_utils=checks)


def test_the_layer_uses_the_kernel_only_under_autocast() -> None:
    torch.manual_seed(0)
    layer = Conv2d(32, 64, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
    x = torch.randn(32, 32, 6, 6).contiguous(memory_format=torch.channels_last)
    plain = nn.Conv2d.forward(layer, x)
    assert torch.equal(layer(x), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), conv2d(x.bfloat16(), layer.weight, 1, 1))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert float((compiled.detach().float() - plain.detach()).norm() / plain.detach().norm()) < 0.01


@pytest.mark.parametrize(("in_channels", "stride"), [(64, 1), (32, 2)])
def test_a_block_is_as_accurate_as_with_pytorchs_convolutions(
    in_channels: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    block = BasicBlock(in_channels, 64, stride).to(memory_format=torch.channels_last)
    x = torch.randn(64, in_channels, 8, 8).contiguous(memory_format=torch.channels_last)
    direction = torch.randn(64, 64, 8 // stride, 8 // stride)

    def gradients(enabled: bool) -> list[Tensor]:
        module, images = copy.deepcopy(block), x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = module(images)
        (out.float() * direction).sum().backward()
        assert images.grad is not None
        return [out.detach().float(), images.grad, *(p.grad for p in module.parameters() if p.grad is not None)]

    ours, exact_ones = gradients(True), gradients(False)
    monkeypatch.setattr(convolution, "pays", lambda *_: False)
    for found, plain, expected in zip(ours, gradients(True), exact_ones, strict=True):
        # Rounding moves a few values across the zero of the ReLU, different ones in the two cases.
        assert float((found - expected).norm()) <= 1.25 * float((plain - expected).norm())
