"""Geometric operations against PIL and torchvision, with the same parameters."""

from __future__ import annotations

import pytest
import torch
from images import varied
from PIL import Image
from pil_views import PIL_OPERATIONS, each_by_pil, interleaved, planar
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tv

from scan_fast.random import stream_key
from scan_fast.views import geometry
from scan_fast.views.parameters import STRONG_INDEX, AffineView


@pytest.mark.parametrize("name", PIL_OPERATIONS)
@pytest.mark.parametrize("side", [8, 32, 75, 96])
def test_geometric_operations_equal_pil(name: str, side: int, device: str) -> None:
    n = 41
    images = varied(n, side, side)
    limit = 30.0 if name == "rotate" else 0.1
    amounts = torch.linspace(-limit, limit, n)
    kind = torch.full((n,), STRONG_INDEX[name], device=device)
    matrix = geometry.matrices(kind, amounts.to(device), side, STRONG_INDEX)
    got = interleaved(geometry.affine_nearest(planar(images, device), matrix))
    assert torch.equal(got, each_by_pil(images, PIL_OPERATIONS[name], amounts))


def boxes(rows: list[tuple[int, int, int, int]], flips: list[bool], device: str = "cpu") -> dict[str, torch.Tensor]:
    names = ("top", "left", "height", "width")
    columns = zip(names, zip(*rows, strict=True), strict=True)
    params = {name: torch.tensor(column, device=device) for name, column in columns}
    return {**params, "flip": torch.tensor(flips, device=device)}


@pytest.mark.parametrize(
    ("source", "side"), [((32, 32), 32), ((96, 96), 64), ((40, 57), 24), ((8, 8), 32), ((256, 256), 33)]
)
def test_crop_resize_equals_torchvision(source: tuple[int, int], side: int, device: str) -> None:
    height, width = source
    n = 60
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(n):
        h = int(torch.randint(1, height + 1, (1,), generator=g))
        w = int(torch.randint(1, width + 1, (1,), generator=g))
        top = int(torch.randint(0, height - h + 1, (1,), generator=g))
        left = int(torch.randint(0, width - w + 1, (1,), generator=g))
        rows.append((top, left, h, w))
    flips = [i % 2 == 0 for i in range(n)]
    images = varied(n, height, width)
    got = interleaved(geometry.crop_resize(planar(images, device), side, boxes(rows, flips, device)))
    unequal = 0.0
    for i, (top, left, h, w) in enumerate(rows):
        image = Image.fromarray(images[i].numpy())
        direct = tv.resized_crop(image, top, left, h, w, [side, side], InterpolationMode.BILINEAR, antialias=True)
        # Some Pillow versions shrink tall crops vertically first; two calls pin the order of the passes.
        cropped = tv.crop(image, top, left, h, w)
        ordered = cropped.resize((side, h), Image.Resampling.BILINEAR).resize((side, side), Image.Resampling.BILINEAR)
        for expected, share in ((direct, 0.0), (ordered, 1.0)):
            pixels = tv.pil_to_tensor(tv.hflip(expected) if flips[i] else expected).permute(1, 2, 0)
            difference = (got[i].int() - pixels.int()).abs()
            assert int(difference.max()) <= 1
            unequal += share * float((difference > 0).float().mean()) / n
    # PIL stores its taps in 22 bits, so a mean exactly between two integers may be rounded either way.
    assert unequal < 0.02


def test_boxes_of_the_whole_image_change_nothing() -> None:
    images = varied(6, 16, 16)
    got = interleaved(geometry.crop_resize(planar(images), 16, boxes([(0, 0, 16, 16)] * 6, [False, True] * 3)))
    assert torch.equal(got[0::2], images[0::2])
    assert torch.equal(got[1::2], images[1::2].flip(2))


def test_same_size_crops_copy_the_pixels() -> None:
    images = varied(4, 20, 24)
    rows = [(0, 0, 16, 16), (4, 8, 16, 16), (1, 2, 16, 16), (3, 5, 16, 16)]
    got = interleaved(geometry.crop_resize(planar(images), 16, boxes(rows, [False] * 4)))
    for i, (top, left, h, w) in enumerate(rows):
        assert torch.equal(got[i], images[i, top : top + h, left : left + w])


def test_affine_bilinear_equals_torchvision_on_tensors(device: str) -> None:
    """torchvision receives the same map as angle, shift, zoom and shear."""
    size = 24
    images = varied(12, size, size)
    x = planar(images, device)
    for angle, zoom in ((0.0, 1.0), (20.0, 0.9), (-33.0, 1.2)):
        theta = torch.deg2rad(torch.tensor(angle, dtype=torch.float64))
        cos, sin, c = torch.cos(theta) / zoom, torch.sin(theta) / zoom, size / 2
        row = torch.tensor([cos, sin, c - c * cos - c * sin, -sin, cos, c + c * sin - c * cos]).float()
        got = geometry.affine_bilinear(x, row.to(device).expand(12, 6))
        expected = tv.affine(x, angle, [0, 0], zoom, [0.0], InterpolationMode.BILINEAR)
        assert float((got - expected).abs().max()) <= 0.51


def test_affine_views_matrix_undoes_shear_zoom_rotation_and_shift() -> None:
    """Applying the transform and then the matrix maps the input's centre to itself, for the map of each image."""
    view = AffineView(size=10, degrees=30, translate=0.2, scale=(0.7, 1.4), shear=20)
    params = view.sample(stream_key(0, "s"), 0, torch.arange(500), 0, 10, 10)
    a, b, c, d, e, f = params["matrix"].double().unbind(1)
    determinant = a * e - b * d
    assert float(determinant.min()) > 1 / 1.4**2 - 1e-4 and float(determinant.max()) < 1 / 0.7**2 + 1e-4
    # The input's centre appears within the shift of the output's centre.
    x = ((5 - c) * e - (5 - f) * b) / determinant
    y = ((5 - f) * a - (5 - c) * d) / determinant
    for position in (x, y):
        assert float((position - 5).abs().max()) <= 2 + 1e-4
        assert float((position - 5).abs().max()) > 1.8


def test_box_mask() -> None:
    mask = geometry.box_mask(torch.tensor([[0, 0, 0, 0], [1, 2, 3, 6], [0, 0, 6, 6]]), 6)
    assert mask.shape == (3, 1, 6, 6)
    assert not mask[0].any() and mask[2].all()
    expected = torch.zeros(6, 6, dtype=torch.bool)
    expected[1:3, 2:6] = True
    assert torch.equal(mask[1, 0], expected)
