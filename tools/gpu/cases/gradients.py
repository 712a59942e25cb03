"""Cases of functions with gradients: results and gradients against float64.

A kernel may err at most twice as much as plain PyTorch in the same precision, plus a few units in the last place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.harness import relative_error
from scan_fast.ops.self_tests.comparison import Slack

from . import DTYPES, Call, Case, Judge, Tensors, name_of


def pair(shape: tuple[int, ...], upstream_shape: tuple[int, ...], generator: torch.Generator) -> Tensors:
    """Return two related tensors of a shape, and the gradient from above: 1 to 2, so that none is lost in another."""
    first = torch.randn(shape, generator=generator)
    second = first + torch.randn(shape, generator=generator)
    return first, second, 1 + torch.rand(upstream_shape, generator=generator)


def gradient_cases(
    label: str,
    size: str,
    draw: Callable[[int], Tensors],
    kernel: Call,
    plain: Call,
    exact: Call | None = None,
    slack: Slack | None = None,
    takes: Callable[[torch.dtype], bool] = lambda dtype: True,
) -> Iterator[Case]:
    """Yield a case per dtype; float16 is checked for accuracy alone, and not at the size "smoke".

    Args:
        label: without the dtype.
        size: one of :data:`~tools.gpu.cases.SIZES`.
        draw: from a seed to two inputs and the upstream gradient, float32 on the CPU. It should cache: the dtypes share
            what is drawn.
        kernel: from the inputs and the upstream gradient to results and gradients.
        plain: the same in plain PyTorch.
        exact: the same for float64 inputs; ``plain`` by default.
        slack: of the kernels; on the CPU half the usual one by default, since errors are in norm here, which takes less
            than those of single elements.
        takes: whether the kernels are meant to take a dtype.
    """
    allowance = slack or Slack(cpu=2)
    for dtype in filter(takes, DTYPES if size != "smoke" else DTYPES[:2]):

        def inputs(seed: int, device: str, dtype: torch.dtype = dtype) -> Tensors:
            *tensors, upstream = draw(seed)
            return (*(x.to(device, dtype) for x in tensors), upstream.to(device))

        def judge(inputs: Tensors, dtype: torch.dtype = dtype) -> Judge:
            right = (exact or plain)(*(x.double() for x in inputs))
            allowed = 2 * relative_error(plain(*inputs), right) + allowance.of(dtype, inputs[0].device.type)

            def problem(found: Tensors) -> str:
                error = relative_error(found, right)
                return "" if error <= allowed else f"error {error:.1e}, allowed {allowed:.1e}"

            return problem

        case = Case(f"{label} {name_of(dtype)}", inputs, kernel, judge)
        yield case if dtype != torch.float16 else replace(case, checks=("accuracy",))


def shape_label(shape: tuple[int, ...]) -> str:
    """Return a shape in words: "37x40"."""
    return "x".join(map(str, shape))
