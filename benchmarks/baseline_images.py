"""Images of the baseline: PIL and torchvision transforms, and data sets for DataLoader workers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from scan_fast.data.datasets import Triple
from scan_fast.views.parameters import STRONG_OPERATIONS, AffineView, PlainView, SimCLRView, StrongView, View

from .views import STRONG

Opener = Callable[[int], Image.Image]
"""Opens image i."""


class RandomOperations:
    """Apply ``n`` operations of the strong view, drawn with replacement, each with its own magnitude."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __call__(self, image: Image.Image) -> Image.Image:
        for name, low, high in random.choices(STRONG_OPERATIONS, k=self.n):
            image = STRONG[name](image, random.uniform(low, high))
        return image


class Cutout:
    """Set a square around a random centre to zero; its side is drawn from 1 to ``length``."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        if self.length == 0:
            return image
        height, width = image.shape[1:]
        half = random.randint(1, self.length) // 2
        y, x = random.randrange(height), random.randrange(width)
        image[:, max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 0
        return image


def transform(view: View, mean: Triple, std: Triple) -> Callable[[Image.Image], Tensor]:
    """Return the torchvision transform of a view."""
    finish = [transforms.ToTensor(), transforms.Normalize(mean, std)]
    steps: list[Any]
    if isinstance(view, SimCLRView):
        jitter = transforms.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        steps = [
            transforms.RandomResizedCrop(view.side, scale=view.scale, ratio=view.ratio),
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomApply([jitter], p=view.jitter),
            transforms.RandomGrayscale(p=view.grayscale),
            *finish,
        ]
    elif isinstance(view, StrongView):
        steps = [
            transforms.RandomHorizontalFlip(view.flip),
            transforms.RandomCrop(view.side),
            RandomOperations(view.operations),
            *finish,
            Cutout(view.cutout),
        ]
    elif isinstance(view, AffineView):
        shift = (view.translate, view.translate)
        steps = [
            transforms.RandomAffine(view.degrees, shift, view.scale, view.shear),
            transforms.ColorJitter(view.brightness, view.contrast),
            *finish,
            Cutout(view.cutout),
        ]
    else:
        assert isinstance(view, PlainView)
        steps = [transforms.CenterCrop(view.side), *finish]
    return transforms.Compose(steps)


def square(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to ``size`` pixels and crop the centre."""
    cut: Image.Image = transforms.CenterCrop(size)(transforms.Resize(size)(image))
    return cut


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Two views of every image: both of itself, or the second of a neighbour that is drawn at every access."""

    def __init__(
        self,
        n: int,
        opener: Opener,
        first: Callable[[Image.Image], Tensor],
        second: Callable[[Image.Image], Tensor],
        neighbors: Tensor | None = None,
    ) -> None:
        self.n, self.opener, self.first, self.second = n, opener, first, second
        self.neighbors = None if neighbors is None else neighbors.tolist()

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.opener(index)
        other = image if self.neighbors is None else self.opener(random.choice(self.neighbors[index]))
        return self.first(image), self.second(other)


class Single(Dataset[Tensor]):
    """One view of every image."""

    def __init__(self, n: int, opener: Opener, view: Callable[[Image.Image], Tensor]) -> None:
        self.n, self.opener, self.view = n, opener, view

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Tensor:
        return self.view(self.opener(index))
