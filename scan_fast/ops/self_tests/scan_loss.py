"""Self-test of the SCAN loss."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import reference
from .comparison import FLOATS, Finding, Slack, Tensors, compared, generator, normal, uniform, with_gradients

ENTROPY_WEIGHT = 5.0


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare losses and gradients with the reference."""
    # Heads, rows, classes. A few classes, up to 1,024 and more take different kernels; odd classes are not read as
    # vectors.
    for shape, dtypes in (
        ((2, 5, 7), FLOATS),
        ((3, 130, 10), FLOATS[:2]),
        ((2, 65, 100), FLOATS[:2]),
        ((1, 33, 1000), FLOATS[:2]),
        ((1, 9, 1027), FLOATS[:2]),
    ):
        g = generator()
        first = normal(g, *shape)
        cpu = (first, first + normal(g, *shape), 1 + uniform(g, shape[0]))
        for dtype in dtypes:
            yield compared("x".join(map(str, shape)), dtype, device, _kernel, _plain, cpu, Slack())


def _kernel(anchors: Tensor, neighbors: Tensor, upstream: Tensor) -> Tensors:
    ops = torch.ops.scan_fast
    total, consistency, entropy, mean_prob, row_stats = ops.scan_loss_forward(anchors, neighbors, ENTROPY_WEIGHT)
    grads = ops.scan_loss_backward(upstream, None, None, anchors, neighbors, mean_prob, row_stats, ENTROPY_WEIGHT)
    return (total, consistency, entropy, *grads)


def _plain(anchors: Tensor, neighbors: Tensor, upstream: Tensor) -> Tensors:
    values: list[Tensor] = []

    def total(a: Tensor, n: Tensor) -> Tensor:
        values[:] = reference.scan_loss(a, n, ENTROPY_WEIGHT)
        return values[0]

    results = with_gradients(total, (anchors, neighbors), upstream)
    return (*(value.detach() for value in values), *results[1:])
