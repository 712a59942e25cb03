"""The descriptor of edges and colours: what it tells apart, and what it leaves out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scan_fast.models.backbones import ModelConfig, build_backbone
from scan_fast.models.descriptor import BINS, CELLS, Descriptor

EDGES = CELLS * CELLS * BINS


def stripes(degrees: float, side: int = 48) -> Tensor:
    """Return an image (1, 3, side, side) of stripes whose gradient points in a direction."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle = math.radians(degrees)
    return torch.sin(0.5 * (x * math.cos(angle) + y * math.sin(angle))).expand(1, 3, -1, -1)


def histogram(image: Tensor) -> Tensor:
    """Return the (BINS,) mean histogram of the inner cells."""
    return Descriptor()._edges(image.mean(dim=1))[0, :, 1:-1, 1:-1].mean(dim=(1, 2))


@pytest.mark.parametrize("degrees", [0, 20, 40, 60, 90, 120, 160])
def test_a_stripe_falls_into_the_bins_of_its_direction_and_its_mirror(degrees: int) -> None:
    found = histogram(stripes(degrees))
    distances = [
        min(abs(180 / BINS * b - way) % 180 for way in (degrees, 180 - degrees, degrees - 180)) for b in range(BINS)
    ]
    nearest = min(range(BINS), key=lambda b: min(distances[b], 180 - distances[b]))
    assert int(found.argmax()) in (nearest, -nearest % BINS)


def test_features_are_of_one_form_for_any_size() -> None:
    model = build_backbone(ModelConfig(backbone="descriptor"))
    assert not list(model.parameters()) and not model.state_dict()
    for side in (1, 7, 32, 97):
        features = model(torch.randn(3, 3, side, side))
        assert features.shape == (3, model.out_features) and features.isfinite().all()
    assert model(torch.zeros(2, 3, 16, 16)).equal(torch.zeros(2, 624))


def test_mirror_images_have_the_same_edges_and_brighter_ones_too() -> None:
    torch.manual_seed(0)
    x = F.interpolate(torch.randn(4, 3, 12, 12), size=48, mode="bilinear")
    model = Descriptor()
    torch.testing.assert_close(model(x.flip(-1))[:, :EDGES], model(x)[:, :EDGES], atol=1e-5, rtol=0)
    brighter = model(2 * x + 1)[:, :EDGES]
    assert (F.cosine_similarity(brighter, model(x)[:, :EDGES]) > 0.97).all()
    assert (F.cosine_similarity(model(x.flip(0))[:, :EDGES], model(x)[:, :EDGES]) < 0.7).all()


def test_colors_are_told_apart() -> None:
    red, blue = torch.zeros(2, 1, 3, 32, 32)
    red[:, 0], blue[:, 2] = 1, 1
    assert F.cosine_similarity(Descriptor()(red), Descriptor()(blue)).item() < 0
