"""Self-label loss forward and backward: ``python -m benchmarks.self_label [--device cpu|cuda] [--sizes ...]``.

A size is B x C: batch and classes. About two thirds of the rows are confident; classes are balanced.
"""

from __future__ import annotations

import torch
from torch import Tensor

import scan_fast
from scan_fast.ops import reference

from . import eager, peers
from .ceilings import Work
from .family import Family, Target, main
from .harness import Case, Contender, Tensors, training_step

THRESHOLD = 0.99


def _exact(weak: Tensor, strong: Tensor) -> Tensors:
    return training_step(_static)(weak.double(), strong.detach().double().requires_grad_())


def _ours(weak: Tensor, strong: Tensor) -> Tensor:
    return scan_fast.self_label_loss(weak, strong, THRESHOLD, impl="native")[0]


def _eager(weak: Tensor, strong: Tensor) -> Tensor:
    return eager.self_label_loss(weak, strong, THRESHOLD)


def _static(weak: Tensor, strong: Tensor) -> Tensor:
    return reference.self_label_loss(weak, strong, THRESHOLD, balance=True)[0]


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``1024x1000``."""
    rows, classes = (int(part) for part in size.split("x"))

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        weak = torch.randn(rows, classes, generator=generator)
        label = torch.randint(0, classes, (rows,), generator=generator)
        # Confident rows stand out by 20, unsure ones by 2; none is near the threshold, where rounding would decide.
        sure = torch.rand(rows, generator=generator) < 2 / 3
        sure[0] = True
        weak[torch.arange(rows), label] += torch.where(sure, 20.0, 2.0)
        strong = torch.randn(rows, classes, generator=generator)
        return weak.to(device), strong.to(device).requires_grad_()

    elements = float(rows * classes)
    # Both logits read once, the strong ones again in the backward pass, their gradient written.
    work = Work(flops=0.0, bytes=4 * 4 * elements, exponentials=3 * elements)
    contenders = [
        Contender("scan-fast", training_step(_ours), 1e-4, work, skipped=peers.no_kernel("self_label", device)),
        Contender("eager", training_step(_eager), 1e-4, capturable=False),
        Contender("eager, static shapes", training_step(_static), 1e-4),
        Contender("torch.compile", training_step(peers.compiled(_static)), 1e-4, compiles=True),
    ]
    return Case(size, inputs, _exact, contenders)


FAMILY = Family(
    name="self_label",
    title="Self-label loss forward and backward, float32",
    case=case,
    sizes={
        "cpu": ("128x10", "1000x10", "1024x100", "1024x1000"),
        "cuda": ("1000x10", "1024x100", "1024x1000", "4096x1000"),
    },
    quick_sizes=("64x10", "100x100"),
    memory_sizes={"cpu": ("1024x1000",), "cuda": ("1024x1000",)},
    suite_sizes=("1024x1000", "1000x10", "4096x1000"),
    targets={
        "cpu-amx": (Target("1000x10", times=4.0), Target("1024x1000", times=4.0)),
        # Of an H200; forward and backward of a small batch are two launches of 4 us each.
        "cuda": (Target("40960x1000", share=0.85), Target("1000x10", microseconds=8.0)),
    },
)

if __name__ == "__main__":
    main(FAMILY)
