"""Random parameters of views: determinism, ranges, and the distributions of the reference transforms."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torchvision.transforms import RandomResizedCrop

from scan_fast.random import stream_key
from scan_fast.views.parameters import STRONG_OPERATIONS, AffineView, PlainView, SimCLRView, StrongView, View

KEY = stream_key(0, "pretext")
MANY = torch.arange(20_000)
VIEWS = [SimCLRView(size=32), StrongView(size=32), AffineView(size=32, cutout=6), PlainView(size=24)]


@pytest.mark.parametrize("view", VIEWS, ids=lambda v: v.kind)
def test_parameters_do_not_depend_on_the_batch(view: View) -> None:
    samples = torch.tensor([3, 99, 3, 70_000, 0])
    whole = view.sample(KEY, 4, samples, 1, 32, 32)
    for row, sample in enumerate(samples):
        alone = view.sample(KEY, 4, sample.view(1), 1, 32, 32)
        assert whole.keys() == alone.keys()
        for name, value in whole.items():
            assert torch.equal(value[row : row + 1], alone[name]), name


@pytest.mark.parametrize("view", VIEWS[:3], ids=lambda v: v.kind)
def test_epochs_views_stages_and_seeds_draw_different_parameters(view: View) -> None:
    samples = torch.arange(50)
    draws = [
        view.sample(stream_key(seed, stage), epoch, samples, index, 32, 32)
        for seed, stage, epoch, index in [
            (0, "a", 0, 0),
            (1, "a", 0, 0),
            (0, "b", 0, 0),
            (0, "a", 1, 0),
            (0, "a", 0, 1),
        ]
    ]
    name = {"simclr": "brightness", "strong": "magnitude", "affine": "matrix"}[view.kind]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert (first[name] == second[name]).float().mean() < 0.5


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    low=st.floats(0.01, 1),
    ratio=st.floats(0.2, 1),
    view=st.sampled_from(["simclr", "strong", "plain"]),
)
def test_boxes_lie_inside_the_image(height: int, width: int, low: float, ratio: float, view: str) -> None:
    views: dict[str, View] = {
        "simclr": SimCLRView(size=16, scale=(low, 1.0), ratio=(ratio, 1 / ratio)),
        "strong": StrongView(size=16),
        "plain": PlainView(size=16),
    }
    p = views[view].sample(KEY, 0, torch.arange(200), 0, height, width)
    assert int(p["top"].min()) >= 0 and int(p["left"].min()) >= 0
    assert int(p["height"].min()) >= 1 and int(p["width"].min()) >= 1
    assert int((p["top"] + p["height"]).max()) <= height
    assert int((p["left"] + p["width"]).max()) <= width


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(32, 32, (0.2, 1.0)), (96, 40, (0.5, 1.0)), (20, 200, (0.9, 1.0))]
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    """In the third case no try fits for most images, so they get the central crop."""
    p = SimCLRView(size=32, scale=scale).sample(KEY, 0, torch.arange(4000), 0, height, width)
    image = torch.empty(3, height, width)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3)) for _ in range(4000)]).double()
    for column, name in enumerate(("top", "left", "height", "width")):
        ours = p[name].double().sort().values
        other = theirs[:, column].sort().values
        # Kolmogorov-Smirnov over the common support: 1.95 sqrt(2 / n) is the 0.1 % point.
        grid = torch.arange(float(max(height, width)) + 1).double()
        distance = (torch.searchsorted(ours, grid, right=True) - torch.searchsorted(other, grid, right=True)).abs()
        assert float(distance.max()) / 4000 < 1.95 * math.sqrt(2 / 4000), name


def test_simclr_parameters_have_the_stated_distributions() -> None:
    p = SimCLRView(size=32).sample(KEY, 0, MANY, 0, 32, 32)
    n = len(MANY)

    def near(value: torch.Tensor, expected: float) -> None:
        assert abs(float(value.float().mean()) - expected) < 4 * math.sqrt(expected * (1 - expected) / n)

    near(p["flip"], 0.5)
    near(p["grayscale"], 0.2)
    jittered = p["brightness"] != 1
    near(jittered, 0.8)
    for name in ("contrast", "saturation"):
        assert float(((p[name] != 1) == jittered).float().mean()) > 0.999
    for name, low, high in (
        ("brightness", 0.6, 1.4),
        ("contrast", 0.6, 1.4),
        ("saturation", 0.6, 1.4),
        ("hue", -0.1, 0.1),
    ):
        values = p[name][jittered]
        assert float(values.min()) >= low - 1e-6 and float(values.max()) <= high + 1e-6
        assert abs(float(values.mean()) - (low + high) / 2) < 0.01 * (high - low)
        assert abs(float(values.std()) - (high - low) / math.sqrt(12)) < 0.01 * (high - low)
    orders = Counter(map(tuple, p["order"].tolist()))
    assert len(orders) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert min(orders.values()) > 0.8 * n / 24 and max(orders.values()) < 1.2 * n / 24


def test_simclr_strength_zero_keeps_colours() -> None:
    view = SimCLRView(size=8, brightness=0, contrast=0, saturation=0, hue=0, grayscale=0, flip=0)
    p = view.sample(KEY, 0, torch.arange(100), 0, 8, 8)
    assert bool((p["brightness"] == 1).all() and (p["contrast"] == 1).all() and (p["hue"] == 0).all())
    assert not p["flip"].any() and not p["grayscale"].any()


def test_strong_parameters_have_the_stated_distributions() -> None:
    p = StrongView(size=32).sample(KEY, 0, MANY, 0, 32, 32)
    operation, magnitude = p["operation"], p["magnitude"]
    assert operation.shape == magnitude.shape == (20_000, 4)
    counts = operation.flatten().bincount(minlength=14)
    assert int(counts.min()) > 80_000 / 14 * 0.93 and int(counts.max()) < 80_000 / 14 * 1.07
    # With replacement: four different operations have probability 14*13*12*11 / 14^4 = 0.6253.
    different = (operation.sort(dim=1).values.diff(dim=1) != 0).all(dim=1).float().mean()
    assert abs(float(different) - 0.6253) < 0.015
    for index, (name, low, high) in enumerate(STRONG_OPERATIONS):
        values = magnitude[operation == index]
        assert float(values.min()) >= low and float(values.max()) <= high
        if name == "posterize":
            # int(uniform(4, 8)) is never 8.
            assert values.unique().tolist() == [4, 5, 6, 7]
        else:
            assert abs(float(values.mean()) - (low + high) / 2) < 0.02 * (high - low), name
            assert abs(float(values.std()) - (high - low) / math.sqrt(12)) < 0.02 * (high - low), name
    assert bool((p["top"] == 0).all() and (p["left"] == 0).all())


def test_strong_view_crops_a_larger_image_at_every_place() -> None:
    p = StrongView(size=28).sample(KEY, 0, MANY, 0, 32, 32)
    assert bool((p["height"] == 28).all() and (p["width"] == 28).all())
    for name in ("top", "left"):
        counts = p[name].bincount()
        assert len(counts) == 5 and int(counts.min()) > 3600


@pytest.mark.parametrize("length", [0, 1, 5, 16])
def test_cutout_boxes_equal_the_reference(length: int) -> None:
    """The side is uniform(1..length), centred at a uniform position, and clipped at the borders."""
    top, left, bottom, right = StrongView(size=32, cutout=length).sample(KEY, 0, MANY, 0, 32, 32)["cutout"].unbind(1)
    assert int(top.min()) >= 0 and int(left.min()) >= 0 and int(bottom.max()) <= 32 and int(right.max()) <= 32
    # Away from the border the box is square and of even side.
    inner = (top > 0) & (left > 0) & (bottom < 32) & (right < 32)
    sides = (bottom - top)[inner]
    assert torch.equal(sides, (right - left)[inner])
    expected = {2 * (side // 2) for side in range(1, length + 1)} or {0}
    assert set(sides.unique().tolist()) == expected


def test_plain_view_is_the_centre() -> None:
    p = PlainView(size=24).sample(KEY, 0, torch.arange(3), 0, 32, 33)
    assert [p[k].tolist()[0] for k in ("top", "left", "height", "width")] == [4, 4, 24, 24]
    whole = PlainView(size=64).sample(KEY, 0, torch.arange(3), 0, 32, 32)
    assert [whole[k].tolist()[0] for k in ("top", "left", "height", "width")] == [0, 0, 32, 32]


def test_resolved_fills_only_an_open_size() -> None:
    assert SimCLRView().resolved(96).size == 96
    assert SimCLRView(size=32).resolved(96).size == 32
    with pytest.raises(ValueError, match=r"resolved\(source.size\)"):
        PlainView().sample(KEY, 0, torch.arange(1), 0, 8, 8)


def test_kind_selects_the_view() -> None:
    adapter = TypeAdapter(View)
    assert adapter.validate_python({"kind": "strong", "cutout": 32}) == StrongView(cutout=32)
    assert adapter.validate_python({"kind": "affine", "scale": [0.9, 1.2]}) == AffineView(scale=(0.9, 1.2))
    for wrong in (
        {"kind": "weak"},
        {"kind": "plain", "flip": 0.5},
        {"kind": "simclr", "scale": [0.0, 1.0]},
        {"kind": "simclr", "flip": 2},
    ):
        with pytest.raises(ValidationError):
            adapter.validate_python(wrong)
