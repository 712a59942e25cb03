"""Images for the tests: smooth and noisy, flat and two-toned, so that every branch of the operations is met."""

from __future__ import annotations

import torch


def varied(n: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return (n, height, width, 3) uint8: gradients with noise, pure noise, narrow ranges, greys and flat images."""
    g = torch.Generator().manual_seed(seed)
    y = torch.linspace(0, 1, height).view(1, height, 1, 1)
    x = torch.linspace(0, 1, width).view(1, 1, width, 1)
    a, b, c = (torch.rand((n, 1, 1, 3), generator=g) for _ in range(3))
    images = 255 * (a * y + b * x + c) / 3 + 20 * torch.rand((n, height, width, 3), generator=g)
    images[1::6] = 256 * torch.rand(images[1::6].shape, generator=g)
    images[2::6] = 100 + 30 * torch.rand(images[2::6].shape, generator=g)
    images[3::6] = images[3::6, ..., :1]
    images[4::6] = torch.where(torch.rand(images[4::6].shape, generator=g) < 0.5, 0.0, 255.0)
    images[5::6] = (256 * torch.rand((len(images[5::6]), 1, 1, 3), generator=g)).expand_as(images[5::6])
    return images.clamp(0, 255).to(torch.uint8)
