"""Cases of the SCAN loss."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial

import torch
from torch import Tensor

import scan_fast
from scan_fast.ops import reference
from scan_fast.ops.self_tests.comparison import with_gradients
from scan_fast.ops.self_tests.scan_loss import ENTROPY_WEIGHT

from . import Case, Tensors
from .gradients import gradient_cases, pair, shape_label

SHAPES = {
    "tiny": [(2, 5, 7), (1, 9, 70)],
    "smoke": [(3, 130, 10), (10, 1024, 1000)],
    "full": [(1, 1, 2), (3, 130, 10), (2, 257, 100), (10, 1024, 1000), (1, 33, 5000)],
}
"""Heads, rows and classes."""


def cases(size: str, kernels: str) -> Iterator[Case]:
    """Yield a case per shape and dtype."""
    for shape in SHAPES[size]:
        yield from gradient_cases(shape_label(shape), size, partial(_draw, shape), _kernel, _plain)


@lru_cache(maxsize=2)
def _draw(shape: tuple[int, int, int], seed: int) -> Tensors:
    return pair(shape, shape[:1], torch.Generator().manual_seed(seed))


def _kernel(anchors: Tensor, neighbors: Tensor, upstream: Tensor) -> Tensors:
    def total(a: Tensor, n: Tensor) -> Tensor:
        return scan_fast.scan_loss(a, n, ENTROPY_WEIGHT, impl="native")[0]

    return with_gradients(total, (anchors, neighbors), upstream)


def _plain(anchors: Tensor, neighbors: Tensor, upstream: Tensor) -> Tensors:
    return with_gradients(lambda a, n: reference.scan_loss(a, n, ENTROPY_WEIGHT)[0], (anchors, neighbors), upstream)
