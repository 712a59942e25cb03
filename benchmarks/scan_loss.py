"""SCAN loss forward and backward: ``python -m benchmarks.scan_loss [--device cpu|cuda] [--sizes 10x1024x1000 ...]``.

A size is B x C, or H x B x C for H heads: batch and classes. The loss is the sum over the heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import scan_fast
from scan_fast.ops import reference

from . import eager, peers
from .ceilings import Work
from .family import Family, Target, main
from .harness import Case, Contender, Tensors, training_step

ENTROPY_WEIGHT = 5.0


def _exact(anchors: Tensor, neighbors: Tensor) -> Tensors:
    return training_step(_reference)(*(x.detach().double().requires_grad_() for x in (anchors, neighbors)))


def _reference(anchors: Tensor, neighbors: Tensor) -> Tensor:
    a, n = (x if x.ndim == 3 else x[None] for x in (anchors, neighbors))
    return reference.scan_loss(a, n, ENTROPY_WEIGHT)[0].sum()


def _ours(anchors: Tensor, neighbors: Tensor) -> Tensor:
    total = scan_fast.scan_loss(anchors, neighbors, ENTROPY_WEIGHT, impl="native")[0]
    return total if total.ndim == 0 else total.sum()


def _eager(anchors: Tensor, neighbors: Tensor) -> Tensor:
    return eager.scan_loss(anchors, neighbors, ENTROPY_WEIGHT)


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``1024x10`` or ``10x1024x1000``."""
    shape = [int(part) for part in size.split("x")]
    if len(shape) not in (2, 3):
        raise ValueError(f"a size is B x C or H x B x C, got {size!r}")

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        anchors = 2 * torch.randn(shape, generator=generator)
        neighbors = anchors + torch.randn(shape, generator=generator)
        return tuple(x.to(device).requires_grad_() for x in (anchors, neighbors))

    elements = float(math.prod(shape))
    # Two logits read in each pass, two gradients written; two exponentials per pass and element of the pair.
    work = Work(flops=0.0, bytes=6 * 4 * elements, exponentials=4 * elements)
    contenders = [
        Contender("scan-fast", training_step(_ours), 1e-4, work, skipped=peers.no_kernel("scan_loss", device)),
        Contender("eager", training_step(_eager), 1e-3),
        Contender("eager, log space", training_step(_reference), 1e-4),
        Contender("torch.compile", training_step(peers.compiled(_eager)), 1e-3, compiles=True),
    ]
    return Case(size, inputs, _exact, contenders)


FAMILY = Family(
    name="scan_loss",
    title="SCAN loss forward and backward, float32",
    case=case,
    sizes={
        "cpu": ("128x10", "1024x10", "1024x100", "10x1024x1000"),
        "cuda": ("128x10", "1024x10", "10x1024x100", "10x1024x1000", "10x4096x1000"),
    },
    quick_sizes=("64x10", "2x32x100"),
    memory_sizes={"cpu": ("10x1024x1000",), "cuda": ("10x1024x1000",)},
    suite_sizes=("10x1024x1000", "1024x10", "10x4096x1000"),
    targets={
        "cpu-amx": (Target("10x1024x1000", times=5.0), Target("1024x10", times=8.0)),
        "cpu-avx512": (Target("10x1024x1000", times=4.0), Target("1024x10", times=8.0)),
        # A backward pass of a single multiplication already takes an eighth of eager's time.
        "cpu-avx2": (Target("1024x10", times=3.0),),
        # Of an H200; forward and backward of a small batch are two launches of 4 us each.
        "cuda": (Target("10x4096x1000", share=0.85), Target("1024x10", microseconds=8.0)),
    },
)

if __name__ == "__main__":
    main(FAMILY)
