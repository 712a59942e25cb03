"""Views by the fused kernel, from recipes that are given: ``python -m benchmarks.augment [--device cpu|cuda]``.

A size is N x S x V: images, their side, and the side of the views. Recipes have five random operations each, and boxes,
mirroring and cutouts. Only the kernel is timed; :mod:`benchmarks.views` compares whole renderers with their peers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scan_fast.ops.augment import Operation, augment
from scan_fast.ops.self_tests.augment import SCALE, SHIFT, STEPS, random_recipes

from . import peers
from .ceilings import Work
from .family import Family, main
from .harness import Case, Contender, Tensors


def draw(count: int, source: int, side: int, seed: int) -> Tensors:
    """Return noise images and random recipes on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(0, len(Operation), (count, STEPS), generator=generator)
    return random_recipes(count, source, side, kinds, generator)


def views(images: Tensor, recipes: Tensor, side: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the views of the images, (N, side, side, 3), on their device."""
    return augment(images, recipes, side, SCALE, SHIFT, dtype)


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``1024x32x32``."""
    count, source, side = (int(part) for part in size.split("x"))

    def inputs(seed: int) -> Tensors:
        images, recipes = draw(count, source, side, seed)
        return images.to(device), recipes

    def ours(images: Tensor, recipes: Tensor) -> Tensors:
        return (views(images, recipes, side),)

    def exact(images: Tensor, recipes: Tensor) -> Tensors:
        # The CPU's kernel, which the tests compare with PIL: the bits are the same on every device.
        return (views(images.cpu(), recipes, side),)

    work = Work(flops=0.0, bytes=count * (3.0 * source**2 + 12.0 * side**2))
    # The host reads the recipes: no CUDA graph can hold the call.
    skipped = peers.no_kernel("augment", device)
    return Case(size, inputs, exact, [Contender("scan-fast", ours, 0.0, work, capturable=False, skipped=skipped)])


FAMILY = Family(
    name="augment",
    title="Views by the fused kernel",
    case=case,
    sizes={"cpu": ("512x32x32", "32x256x224"), "cuda": ("1024x32x32", "1024x96x96", "256x256x224")},
    quick_sizes=("20x16x16", "3x20x24"),
    memory_sizes={"cpu": ("32x256x224",), "cuda": ("256x256x224",)},
    suite_sizes=("1024x32x32", "256x256x224", "1024x96x96"),
)

if __name__ == "__main__":
    main(FAMILY)
