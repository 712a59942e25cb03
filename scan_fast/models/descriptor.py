"""A descriptor of images that needs no training: the directions of edges in each part of an image, and its colours.

Histograms of oriented gradients are from Dalal and Triggs (CVPR 2005). The colours are means of small parts. The
features of a network that has seen few images are worse (docs/recipes.md).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CELLS = 8
"""Cells a side, for edges."""
BINS = 9
"""Orientations, which cover half a turn: an edge from dark to bright is like one from bright to dark."""
SHARPNESS = 4
"""Power of the cosine by which a gradient counts for the orientations near its own."""
FLOOR = 0.2
"""Added to the strength of the edges around a cell, by which its histogram is divided: empty parts stay weak."""
TYPICAL = 5.0
"""Length of the edges' vector in photographs, by which it is divided. It is shorter in images of noise or one color."""
PATCHES = 4
"""Parts a side, for colours."""
COLOR_SHARE = 0.5
"""Weight of the colours relative to the edges."""


class Descriptor(nn.Module):
    """Map normalised images (B, 3, H, W) to features (B, 624).

    An image and its mirror image have the same edges. There are no parameters.
    """

    out_features = CELLS * CELLS * BINS + 3 * PATCHES * PATCHES

    def __init__(self) -> None:
        super().__init__()
        doubled = torch.arange(BINS) * (2 * math.pi / BINS)
        self.directions: Tensor
        self.register_buffer("directions", torch.stack((doubled.cos(), doubled.sin()), dim=1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute in float32: the edges less their mean, and the colours."""
        x = x.float()
        edges = self._edges(x.mean(dim=1)).flatten(1)
        edges = (edges - edges.mean(dim=1, keepdim=True)) / TYPICAL
        return torch.cat((edges, COLOR_SHARE * self._colors(x)), dim=1)

    def _edges(self, gray: Tensor) -> Tensor:
        """Return (B, BINS, CELLS, CELLS) histograms of orientations, in units of the edges around each cell."""
        padded = F.pad(gray[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
        dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
        dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
        strength = (dx.square() + dy.square() + 1e-12).sqrt()
        # Twice the gradient's angle is the same for opposite gradients. No matrix product: autocast would round it.
        square = strength.square()
        cosine, sine = ((dx.square() - dy.square()) / square)[:, None], (2 * dx * dy / square)[:, None]
        along, across = self.directions.view(BINS, 2, 1, 1).unbind(1)
        cosines = (along * cosine + across * sine).relu()
        cells = F.adaptive_avg_pool2d(strength[:, None] * cosines**SHARPNESS, CELLS)
        squares = F.pad(cells.square().sum(dim=1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        cells = cells / (F.avg_pool2d(squares, 3, stride=1).sqrt() + FLOOR)
        # The mirror image has the orientations of opposite sign.
        return cells + cells.roll(-1, dims=1).flip(1, 3)

    def _colors(self, x: Tensor) -> Tensor:
        """Return (B, 3 PATCHES^2): brightness, red against green, yellow against blue, at most 1 / PATCHES each."""
        red, green, blue = x.unbind(1)
        opponents = torch.stack((x.mean(dim=1), 3 * (red - green), red + green - 2 * blue), dim=1)
        return F.adaptive_avg_pool2d(opponents, PATCHES).tanh().flatten(1) / PATCHES
