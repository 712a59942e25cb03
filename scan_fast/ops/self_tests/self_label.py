"""Self-test of the self-label loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from .. import reference
from .comparison import FLOATS, Finding, Slack, Tensors, compared, generator, normal, uniform, with_gradients

THRESHOLD = 0.9


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare the loss, the number of confident rows and the gradient with the reference."""
    for (rows, classes), balance, dtypes in (
        ((5, 7), True, FLOATS),
        ((300, 10), False, FLOATS[:2]),
        ((300, 10), True, FLOATS[:2]),
        ((65, 100), True, FLOATS[:2]),
        ((9, 1027), True, FLOATS[:2]),
    ):
        g = generator()
        strong, weak = normal(g, rows, classes), normal(g, rows, classes)
        # Rows stand out by 20 or not at all: none is near the threshold, where rounding would decide.
        label = torch.arange(rows, device="cpu") * 7 % classes
        weak[torch.arange(rows, device="cpu"), label] += 20.0 * (uniform(g, rows) < 0.7)
        cpu = (weak, strong, 1 + uniform(g))
        case = f"{rows}x{classes}{' balanced' if balance else ''}"
        for dtype in dtypes:
            yield compared(case, dtype, device, partial(_kernel, balance), partial(_plain, balance), cpu, Slack())


def _kernel(balance: bool, weak: Tensor, strong: Tensor, upstream: Tensor) -> Tensors:
    ops = torch.ops.scan_fast
    loss, count, target, row_weight, row_stats = ops.self_label_forward(weak, strong, THRESHOLD, balance)
    return loss, count, ops.self_label_backward(upstream, strong, target, row_weight, row_stats)


def _plain(balance: bool, weak: Tensor, strong: Tensor, upstream: Tensor) -> Tensors:
    counts: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        value, count = reference.self_label_loss(weak, x, THRESHOLD, balance)
        counts[:] = [count]
        return value

    value, gradient = with_gradients(loss, (strong,), upstream)
    return value, counts[0], gradient
