"""Self-test of the kernel that makes views."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..augment import RECIPE_HEADER, RECIPE_STEP, Operation
from .comparison import Finding, Tensors, generator, poison, same, uniform

SCALE, SHIFT = (0.017, 0.021, 0.019), (-2.1, -1.9, 0.3)
STEPS = 5


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare with the CPU's kernel in every bit: views have the same bits on every device.

    On the CPU, whose kernel the tests compare with PIL, each image is rendered by itself and compared with the batch.
    Crops that keep their size and mirroring are repeated in plain PyTorch.
    """
    # Images, side of the source, side of the view: a warp per image, a block, and no shared memory.
    for count, source, side in ((9, 14, 11), (17, 32, 32), (3, 30, 21), (3, 60, 48), (1, 140, 130)):
        # Every operation, in turn.
        kinds = (torch.arange(STEPS * count, device="cpu").view(count, STEPS) * 3 + 1) % len(Operation)
        images, recipes = random_recipes(count, source, side, kinds, generator())
        for dtype in (torch.uint8, torch.float32, torch.bfloat16) if count == 9 else (torch.float32,):
            alone = [_views(images[i : i + 1], recipes[i : i + 1], side, dtype) for i in range(count)]
            exact = torch.cat(alone)
            poison(device, exact)
            found = _views(images.to(device), recipes, side, dtype)
            yield same(f"{count}x{source}->{side} {dtype}".replace("torch.", ""), (found,), (exact,))
    kinds = torch.full((9, STEPS), int(Operation.IDENTITY), device="cpu")
    images, recipes = random_recipes(9, 24, 24, kinds, generator())
    recipes[:, :4] = torch.tensor([0, 0, 24, 24], dtype=torch.int32, device="cpu")
    found = _views(images.to(device), recipes, 24, torch.uint8)
    mirrored = torch.where(recipes[:, 4, None, None, None] == 1, images.flip(2), images)
    yield same("9x24 mirrored", (found,), (mirrored,))


def _views(images: Tensor, recipes: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    views: Tensor = torch.ops.scan_fast.augment(images, None, recipes, side, SCALE, SHIFT, dtype)
    return views


def random_recipes(count: int, source: int, side: int, kinds: Tensor, generator: torch.Generator) -> Tensors:
    """Draw noise images, and recipes with boxes, mirroring, cutouts and the magnitudes of given operations.

    Args:
        count: images, one view each.
        source: side of the images in pixels.
        side: side of the views in pixels.
        kinds: (count, steps) integers, the :class:`Operation` of each step.
        generator: of the CPU.

    Returns:
        images, (count, source, source, 3) uint8, and recipes, (count, RECIPE_HEADER + steps * RECIPE_STEP) int32.
    """

    def below(bound: Tensor | int) -> Tensor:
        bounds = torch.as_tensor(bound, dtype=torch.int32, device="cpu").expand(count)
        return (uniform(generator, count) * bounds).int().minimum(bounds - 1)

    images = (256 * uniform(generator, count, source, source, 3)).to(torch.uint8)
    height, width, top, left = (below(bound) for bound in (source, source, side, side))
    height, width = height + 1, width + 1
    box = (below(source - height + 1), below(source - width + 1), height, width)
    cutout = (top, left, top + below(side - top + 1), left + below(side - left + 1))
    n = kinds.shape[1]
    recipes = torch.zeros((count, RECIPE_HEADER + n * RECIPE_STEP), dtype=torch.int32, device="cpu")
    recipes[:, :RECIPE_HEADER] = torch.stack((*box, below(2), *cutout), dim=1)
    steps = recipes[:, RECIPE_HEADER:].view(count, n, RECIPE_STEP)
    steps[..., 0] = kinds
    amount = uniform(generator, count, n)
    amount = torch.where(kinds == Operation.HUE, amount - 0.5, 2 * amount)
    amount = torch.where(kinds == Operation.SOLARIZE, 128 * amount, amount)
    amount = torch.where(kinds == Operation.POSTERIZE, (4 * amount).floor(), amount)
    steps[..., 1] = amount.view(torch.int32)
    turned = torch.tensor([[1.0, 0.1, -2.0], [-0.1, 1.0, 1.0]], dtype=torch.float32, device="cpu")
    maps = turned + 0.2 * uniform(generator, count, n, 2, 3)
    bilinear, nearest = kinds == Operation.BILINEAR, kinds == Operation.NEAREST
    steps[..., 1:][bilinear] = maps.flatten(2).view(torch.int32)[bilinear]
    # Start, per column, per row.
    steps[..., 1:][nearest] = (65536 * maps.roll(1, dims=3).flatten(2)).int()[nearest]
    return images, recipes
