"""Cases of the kernel that makes views, which must be right in every bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from benchmarks.augment import draw, views

from . import Case, Judge, Tensors, name_of

DTYPES = (torch.uint8, torch.float32, torch.bfloat16)
EXEMPT = {"graph": "the host reads the recipes of the views: no graph can hold the call"}


@dataclass(frozen=True)
class Views:
    """Views: their number, the side of the source and of the view in pixels, the dtype."""

    count: int
    source: int
    side: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.count}x{self.source}->{self.side} {name_of(self.dtype)}"

    def inputs(self, seed: int, device: str) -> Tensors:
        """Return images on the device, and recipes on the CPU."""
        images, recipes = _draw(self.count, self.source, self.side, seed)
        return images.to(device), recipes

    def call(self, images: Tensor, recipes: Tensor) -> Tensors:
        """Make the views."""
        return (views(images, recipes, self.side, self.dtype),)

    def judge(self, inputs: Tensors) -> Judge:
        """Make each view by itself on the CPU: the result depends neither on the device nor on the batch."""
        images, recipes = inputs[0].cpu(), inputs[1]
        alone = [self.call(images[i : i + 1], recipes[i : i + 1])[0] for i in range(self.count)]

        def problem(found: Tensors) -> str:
            wrong = int((found[0].cpu() != torch.cat(alone)).sum())
            return f"{wrong} values differ from the CPU's" if wrong else ""

        return problem


SHAPES = {
    # A warp per image, a block per image, and a block whose image does not fit into shared memory.
    "tiny": [(9, 14, 11), (2, 30, 35)],
    "smoke": [(203, 32, 32), (9, 24, 19), (5, 100, 96), (3, 150, 130)],
    # 17 to 22 and 111 to 113: around the limits of a block's shared memory.
    "full": [
        (203, 32, 32),
        (11, 24, 17),
        (9, 30, 19),
        (9, 20, 22),
        (17, 70, 48),
        (5, 100, 96),
        (3, 120, 111),
        (3, 90, 113),
        (3, 150, 130),
    ],
}
"""Views, side of the source, side of the view."""


def cases(size: str, kernels: str) -> Iterator[Case]:
    """Yield a case per shape and dtype; repeated calls are those of float32."""
    for count, source, side in SHAPES[size]:
        for dtype in DTYPES:
            batch = Views(count, source, side, dtype)
            checks = ("accuracy", "call", *(("repeat",) if dtype == torch.float32 else ()))
            yield Case(str(batch), batch.inputs, batch.call, batch.judge, checks)


@lru_cache(maxsize=2)
def _draw(count: int, source: int, side: int, seed: int) -> Tensors:
    return draw(count, source, side, seed)
