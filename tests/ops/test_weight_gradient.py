"""The weight gradient of float32 convolutions on the CPU, against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from scan_fast.ops import native
from scan_fast.ops.convolution import grad_weight

pytestmark = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")

CASES = [  # (batch, in channels, out channels, height, width, kernel, stride, padding)
    (5, 64, 64, 32, 32, 3, 1, 1),
    (3, 64, 128, 32, 32, 3, 2, 1),
    (3, 64, 128, 32, 32, 1, 2, 0),
    (40, 48, 100, 4, 4, 3, 1, 1),
    (7, 16, 8, 8, 8, 3, 2, 1),
    (2, 3, 5, 9, 33, 5, 3, 2),
    (2, 17, 7, 12, 20, 7, 2, 3),
    (1, 1, 1, 1, 1, 1, 1, 0),
    (2, 33, 13, 10, 10, 2, 4, 0),
    (1, 16, 16, 3, 400, 3, 1, 1),
]


def operands(batch: int, in_channels: int, out_channels: int, height: int, width: int, kernel: int, stride: int,
             padding: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return grad_y, x and the weight gradient in float64."""
    torch.manual_seed(0)
    x = torch.randn(batch, in_channels, height, width).contiguous(memory_format=torch.channels_last)
    y = F.conv2d(x, torch.zeros(out_channels, in_channels, kernel, kernel), stride=stride, padding=padding)
    grad_y = torch.randn(y.shape).contiguous(memory_format=torch.channels_last)
    return grad_y, x, plain_grad_weight(grad_y, x, kernel, stride, padding)


def plain_grad_weight(grad_y: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    """Compute the weight gradient in float64."""
    weight = torch.zeros(grad_y.shape[1], x.shape[1], kernel, kernel, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.double(), weight, stride=stride, padding=padding)
    return torch.autograd.grad(y, weight, grad_y.double())[0]


def assert_exact(found: Tensor, expected: Tensor, grad_y: Tensor, x: Tensor, *geometry: int) -> None:
    """Compare with float64. Roundings of n sums are at most 2^-24 of the sum of magnitudes, and partly cancel."""
    terms = grad_y[:, 0].numel()
    allowed = 4 * terms**0.5 * 2.0**-24 * plain_grad_weight(grad_y.abs(), x.abs(), *geometry)
    assert ((found.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case: tuple[int, ...]) -> None:
    grad_y, x, expected = operands(*case)
    found = grad_weight(grad_y, x, *case[5:])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_exact(found, expected, grad_y, x, *case[5:])


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(1, 6),
    in_channels=st.integers(1, 40),
    out_channels=st.integers(1, 30),
    height=st.integers(1, 20),
    width=st.integers(1, 40),
    kernel=st.integers(1, 5),
    stride=st.integers(1, 4),
    padding=st.integers(0, 3),
)
def test_every_geometry(
    batch: int, in_channels: int, out_channels: int, height: int, width: int, kernel: int, stride: int, padding: int
) -> None:
    if min(height, width) + 2 * padding < kernel:
        with pytest.raises(ValueError, match="x must not be empty, nor smaller than the kernel"):
            grad_weight(torch.zeros(batch, out_channels, 1, 1), torch.zeros(batch, in_channels, height, width), kernel,
                        stride, padding)  # fmt: skip
        return
    grad_y, x, expected = operands(batch, in_channels, out_channels, height, width, kernel, stride, padding)
    geometry = (kernel, stride, padding)
    assert_exact(grad_weight(grad_y, x, *geometry), expected, grad_y, x, *geometry)


def test_same_bits_for_any_number_of_threads() -> None:
    grad_y, x, _ = operands(6, 48, 40, 16, 16, 3, 1, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(grad_weight(grad_y, x, 3, 1, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, tmp_path: Path) -> None:
    cases = [(*operands(*case), case[5:]) for case in CASES[3:]]
    torch.save(cases, tmp_path / "cases.pt")
    code = """
import sys, torch
from scan_fast.ops.convolution import grad_weight
for grad_y, x, expected, geometry in torch.load(sys.argv[1]):
    grad_y, x = (t.contiguous(memory_format=torch.channels_last) for t in (grad_y, x))
    torch.testing.assert_close(grad_weight(grad_y, x, *geometry).double(), expected, rtol=0, atol=1e-4)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "cases.pt")]
    environment = {**os.environ, "SCAN_FAST_CPU_ISA": isa}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_flops_are_counted_as_those_of_pytorch() -> None:
    grad_y, x, _ = operands(2, 16, 8, 9, 7, 3, 2, 1)
    weight = torch.empty(8, 16, 3, 3)
    with FlopCounterMode(display=False) as counter:
        grad_weight(grad_y, x, 3, 2, 1)
    with FlopCounterMode(display=False) as plain:
        torch.ops.aten.convolution_backward(
            grad_y, x, weight, None, (2, 2), (1, 1), (1, 1), False, (0, 0), 1, (False, True, False)
        )
    assert counter.get_total_flops() == plain.get_total_flops() == 2 * grad_y.numel() * 16 * 9


def test_bad_operands_are_named() -> None:
    grad_y, x, _ = operands(2, 16, 8, 8, 8, 3, 1, 1)
    with pytest.raises(ValueError, match="x must be float32 in channels-last layout"):
        grad_weight(grad_y, x.double(), 3, 1, 1)
    with pytest.raises(ValueError, match="grad_y must be float32 in channels-last layout"):
        grad_weight(grad_y.contiguous(), x, 3, 1, 1)
    with pytest.raises(ValueError, match="grad_y must have shape"):
        grad_weight(grad_y, x, 3, 2, 1)
    with pytest.raises(ValueError, match="stride must be at least 1"):
        grad_weight(grad_y, x, 3, 0, 1)
    with pytest.raises(ValueError, match="kernel must be at least 1"):
        grad_weight(grad_y, x, 0, 1, 1)
    with pytest.raises(ValueError, match="must not be empty"):
        grad_weight(grad_y[:0], x[:0], 3, 1, 1)
