"""Cases of the self-label loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

import scan_fast
from scan_fast.ops import reference
from scan_fast.ops.self_tests.comparison import with_gradients
from scan_fast.ops.self_tests.self_label import THRESHOLD

from . import Case, Tensors
from .gradients import gradient_cases, pair, shape_label

SHAPES = {
    "tiny": [(5, 7), (9, 70)],
    "smoke": [(1000, 10), (2048, 1000)],
    "full": [(1, 2), (1000, 10), (257, 100), (2048, 1000), (33, 5000)],
}
"""Rows and classes."""


def cases(size: str, kernels: str) -> Iterator[Case]:
    """Yield the cases with and without class balancing."""
    for shape in SHAPES[size]:
        for balance in (True, False):
            label = f"{shape_label(shape)} {'balanced' if balance else 'plain'}"
            kernel, plain = partial(_kernel, balance), partial(_plain, balance)
            yield from gradient_cases(label, size, partial(_draw, shape), kernel, plain)


@lru_cache(maxsize=2)
def _draw(shape: tuple[int, int], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    weak, strong, upstream = pair(shape, (), generator)
    # Rows stand out by 20 or not at all: none is near the threshold, where rounding would decide.
    rows, classes = shape
    label = torch.randint(0, classes, (rows,), generator=generator)
    weak[torch.arange(rows), label] += 20.0 * (torch.rand(rows, generator=generator) < 0.7)
    return weak, strong, upstream


def _kernel(balance: bool, weak: Tensor, strong: Tensor, upstream: Tensor) -> Tensors:
    def loss(x: Tensor) -> Tensor:
        return scan_fast.self_label_loss(weak, x, THRESHOLD, balance=balance, impl="native")[0]

    return with_gradients(loss, (strong,), upstream)


def _plain(balance: bool, weak: Tensor, strong: Tensor, upstream: Tensor) -> Tensors:
    def loss(x: Tensor) -> Tensor:
        return reference.self_label_loss(weak.to(x.dtype), x, THRESHOLD, balance)[0]

    return with_gradients(loss, (strong,), upstream)
