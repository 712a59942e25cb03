"""Inputs and comparisons that the self-tests share.

Inputs are made on the CPU in float32, whatever the default device and dtype of the caller are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Finding = tuple[str, float, float]
"""A case, its error, and the error that is allowed."""

SEED = 20200525
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class Slack:
    """Units in the last place that a kernel may err besides twice the error of plain PyTorch.

    Attributes:
        reduced: for 16-bit inputs.
        gpu: for float32 on a GPU, whose matrix units truncate sums instead of rounding them.
        cpu: for float32 on the CPU; an element may be 2^-22 of the largest one off.
    """

    reduced: int = 2
    gpu: int = 16
    cpu: int = 4

    def of(self, dtype: torch.dtype, device_type: str) -> float:
        """Return the relative error that a dtype and a device are allowed."""
        units = self.reduced if dtype != torch.float32 else self.cpu if device_type == "cpu" else self.gpu
        return units * ROUNDING[dtype]


def generator() -> torch.Generator:
    """Return the generator of a case; always the same."""
    return torch.Generator("cpu").manual_seed(SEED)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw from the standard normal distribution."""
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Draw from [0, 1)."""
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def poison(device: torch.device, *like: Tensor) -> None:
    """Leave NaN in the memory that results of these shapes get next: an allocator keeps freed blocks by size."""
    blocks = [torch.full(x.shape, math.nan, dtype=torch.float32, device=device) for x in like for _ in range(3)]
    del blocks


def with_gradients(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
    """Return a function's result and its gradients with respect to the inputs."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    result = function(*leaves)
    # Without grad_outputs, which would import the compiler's symbolic shapes at first.
    return (result.detach(), *torch.autograd.grad((result * upstream.to(result)).sum(), leaves))


def error(found: Tensors, exact: Tensors) -> float:
    """Return the largest error of a tensor, in norm and of an element, relative to the exact tensor's."""
    worst = 0.0
    for ours, right in zip(found, exact, strict=True):
        ours, right = ours.detach().to("cpu", torch.float64), right.to(torch.float64)
        if ours.shape != right.shape or not bool(ours.isfinite().all()):
            return math.inf
        difference = ours - right
        for size in (lambda x: float(x.norm()), lambda x: float(x.abs().max())):
            scale = size(right)
            worst = max(worst, size(difference) / scale if scale > 0 else size(difference))
    return worst


def compared(
    case: str,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Callable[..., Tensors],
    plain: Callable[..., Tensors],
    cpu: Tensors,
    slack: Slack,
) -> Finding:
    """Compare a kernel with the reference in float64.

    Args:
        case: in words, without the dtype.
        dtype: of the inputs.
        device: device that the kernel runs on.
        kernel: from inputs on the device to results.
        plain: the same in plain PyTorch; runs on the CPU.
        cpu: the inputs in float32 on the CPU; the last is the upstream gradient and keeps its dtype.
        slack: added to twice the error of ``plain``.
    """
    inputs = (*(x.to(dtype) for x in cpu[:-1]), cpu[-1])
    exact = plain(*(x.double() for x in inputs))
    allowed = 2 * error(plain(*inputs), exact) + slack.of(dtype, device.type)
    there = tuple(x.to(device) for x in inputs)
    poison(device, *exact)
    return f"{case} {dtype}".replace("torch.", ""), error(kernel(*there), exact), allowed


def same(case: str, found: Tensors, exact: Tensors) -> Finding:
    """Count the values that differ in any bit: none may."""
    wrong = sum(
        int((ours.cpu() != right).sum()) if ours.shape == right.shape else right.numel()
        for ours, right in zip(found, exact, strict=True)
    )
    return f"{case}: {wrong} values differ", float(wrong), 0.0
