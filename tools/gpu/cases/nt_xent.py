"""Cases of NT-Xent."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

import scan_fast
from benchmarks.nt_xent import TEMPERATURE, exact_losses
from scan_fast.ops import reference
from scan_fast.ops.self_tests.comparison import with_gradients
from scan_fast.ops.self_tests.nt_xent import SLACK as ELEMENT_SLACK

from . import Case, Tensors
from .gradients import gradient_cases, pair, shape_label

SLACK = replace(ELEMENT_SLACK, cpu=2)  # errors are in norm here
SHAPES = {
    "tiny": [(3, 5), (37, 40)],
    "smoke": [(37, 40), (4096, 128), (2048, 256), (2048, 512)],
    # With 132 multiprocessors, only the last seven make rings go round: csrc/nt_xent/sm90_plan.cuh has the sizes.
    "full": [
        (1, 3),
        (65, 33),
        (130, 128),
        (517, 128),
        (200, 200),
        (300, 260),
        (4352, 64),
        (2048, 192),
        (4096, 128),
        (2048, 256),
        (2048, 512),
        (2048, 1024),
        (9000, 128),
    ],
}
"""Rows of a view and dimensions."""

QUEUES = {
    "tiny": [(7, 24, 51)],
    "smoke": [(256, 128, 4096)],
    "full": [(37, 40, 301), (130, 260, 700), (256, 128, 16384)],
}
"""Rows of a view, dimensions, and rows of a queue of further negatives."""


def cases(size: str, kernels: str) -> Iterator[Case]:
    """Yield the cases of both views as anchors, and of the first alone, and those with a queue."""
    for shape in SHAPES[size]:
        rows, dim = shape
        for both in (True, False) if rows <= 4096 else (True,):
            yield from gradient_cases(
                f"{shape_label(shape)} {'both' if both else 'first'}",
                size,
                partial(_draw, shape, both),
                partial(_kernel, both),
                partial(plain, both),
                partial(_exact, both),
                SLACK,
                partial(covers, kernels, dim),
            )

    for rows, dim, queue in QUEUES[size]:
        for both in (True, False):
            yield from gradient_cases(
                f"{shape_label((rows, dim))} {'both' if both else 'first'} with a queue of {queue}",
                size,
                partial(_draw_queued, rows, dim, queue, both),
                partial(_queued_kernel, both),
                partial(_queued_plain, both),
                slack=SLACK,
                takes=partial(covers, kernels, dim),
            )


def covers(kernels: str, dim: int, _dtype: torch.dtype) -> bool:
    """Return whether a kernel set is meant to take a problem: csrc/nt_xent/nt_xent_sm90.cu says what it covers."""
    return kernels == "portable" or dim <= 1024


@lru_cache(maxsize=2)
def _draw(shape: tuple[int, int], both: bool, seed: int) -> Tensors:
    return pair(shape, ((2 if both else 1) * shape[0],), torch.Generator().manual_seed(seed))


@lru_cache(maxsize=2)
def _draw_queued(rows: int, dim: int, queue: int, both: bool, seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    z0, z1, upstream = pair((rows, dim), ((2 if both else 1) * rows,), generator)
    return z0, z1, torch.randn(queue, dim, generator=generator), upstream


def _queued_kernel(both: bool, z0: Tensor, z1: Tensor, queue: Tensor, upstream: Tensor) -> Tensors:
    anchors = "both" if both else "first"

    def losses(a: Tensor, b: Tensor) -> Tensor:
        return scan_fast.nt_xent(a, b, TEMPERATURE, anchors=anchors, queue=queue, reduction="none", impl="native")

    return with_gradients(losses, (z0, z1), upstream)


def _queued_plain(both: bool, z0: Tensor, z1: Tensor, queue: Tensor, upstream: Tensor) -> Tensors:
    return with_gradients(lambda a, b: reference.nt_xent(a, b, TEMPERATURE, both, queue), (z0, z1), upstream)


def _kernel(both: bool, z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
    anchors = "both" if both else "first"

    def losses(a: Tensor, b: Tensor) -> Tensor:
        return scan_fast.nt_xent(a, b, TEMPERATURE, anchors=anchors, reduction="none", impl="native")

    return with_gradients(losses, (z0, z1), upstream)


def plain(both: bool, z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
    """Return the losses and gradients of the reference."""
    return with_gradients(lambda a, b: reference.nt_xent(a, b, TEMPERATURE, both), (z0, z1), upstream)


def _exact(both: bool, z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
    return exact_losses(z0, z1, upstream, both)
