"""Colour operations against PIL and torchvision on PIL images, with the same parameters."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from images import varied
from PIL import Image, ImageEnhance, ImageOps
from pil_views import PilOperation, each_by_pil, interleaved, planar
from torchvision.transforms import functional as tv

from scan_fast.views import color
from scan_fast.views.parameters import STRONG_INDEX

ENHANCE: dict[str, tuple[Callable[..., torch.Tensor], PilOperation]] = {
    "brightness": (color.brightness, lambda im, f: ImageEnhance.Brightness(im).enhance(f)),
    "contrast": (color.contrast, lambda im, f: ImageEnhance.Contrast(im).enhance(f)),
    "saturation": (color.saturation, lambda im, f: ImageEnhance.Color(im).enhance(f)),
    "sharpness": (color.sharpness, lambda im, f: ImageEnhance.Sharpness(im).enhance(f)),
}
TABLES: dict[str, PilOperation] = {
    "autocontrast": lambda im, _: ImageOps.autocontrast(im),
    "equalize": lambda im, _: ImageOps.equalize(im),
    "solarize": lambda im, v: ImageOps.solarize(im, v),  # type: ignore[arg-type]  # a float works
    "posterize": lambda im, v: ImageOps.posterize(im, int(v)),
    "contrast": lambda im, f: ImageEnhance.Contrast(im).enhance(f),
    "brightness": lambda im, f: ImageEnhance.Brightness(im).enhance(f),
}


@pytest.mark.parametrize("name", ENHANCE)
@pytest.mark.parametrize("shape", [(60, 32, 32), (12, 5, 9), (6, 2, 2), (6, 1, 1)])
def test_enhance_equals_pil(name: str, shape: tuple[int, int, int], device: str) -> None:
    images = varied(*shape)
    factors = torch.linspace(0.05, 1.95, shape[0])
    operation, pil = ENHANCE[name]
    got = interleaved(operation(planar(images, device), factors.to(device)))
    assert torch.equal(got, each_by_pil(images, pil, factors))


def test_grayscale_equals_pil_for_every_luma(device: str) -> None:
    images = varied(60, 32, 32)
    expected = each_by_pil(images, lambda im, _: tv.to_grayscale(im, num_output_channels=3), torch.zeros(60))
    assert torch.equal(interleaved(color.grayscale(planar(images, device))), expected)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.0312, -0.001, 0.002, 0.0456, 0.1, 0.25, 0.5])
def test_hue_equals_torchvision(shift: float, device: str) -> None:
    # A lattice of the colour cube with every value of each channel, and all test images.
    values = torch.cat((torch.arange(0, 256, 5), torch.tensor([1, 127, 128, 254])))
    cube = torch.cartesian_prod(values, values, values).to(torch.uint8).view(1, 1, -1, 3)
    for images in (cube, varied(60, 32, 32)):
        factors = torch.full((len(images),), shift)
        expected = each_by_pil(images, lambda im, f: tv.adjust_hue(im, f), factors)
        got = interleaved(color.hue(planar(images, device), factors.to(device)))
        assert torch.equal(got, expected)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("shape", [(60, 32, 32), (12, 5, 9), (6, 1, 1), (12, 17, 96)])
def test_tables_equal_pil(name: str, shape: tuple[int, int, int], device: str) -> None:
    images = varied(*shape)
    n = len(images)
    values = {
        "solarize": torch.linspace(0, 256, n),
        "posterize": torch.arange(n) % 5.0 + 4,
    }.get(name, torch.linspace(0.05, 1.6, n))
    kind = torch.full((n,), STRONG_INDEX[name], device=device)
    x = planar(images, device)
    table = color.tables(x, kind, values.to(device), STRONG_INDEX)
    assert torch.equal(interleaved(color.apply_tables(x, table)), each_by_pil(images, TABLES[name], values))


def test_tables_of_mixed_operations_do_not_disturb_each_other() -> None:
    images = varied(48, 16, 16, seed=1)
    names = list(TABLES)
    kinds = torch.tensor([STRONG_INDEX[names[i % len(names)]] for i in range(48)])
    values = torch.tensor([{"solarize": 90.0, "posterize": 5.0}.get(names[i % len(names)], 0.4) for i in range(48)])
    x = planar(images)
    mixed = color.tables(x, kinds, values, STRONG_INDEX)
    for i in range(48):
        alone = color.tables(x[i : i + 1], kinds[i : i + 1], values[i : i + 1], STRONG_INDEX)
        assert torch.equal(mixed[i : i + 1], alone)


def test_equalize_clips_where_the_step_is_small() -> None:
    """With few pixels above 255 steps, PIL's running sum passes 255 and is clipped."""
    image = torch.zeros((1, 1, 1275, 3), dtype=torch.uint8)
    image[0, 0, :1274] = (torch.arange(1274) % 255).to(torch.uint8).view(-1, 1)
    image[0, 0, 1274] = 255
    kind = torch.tensor([STRONG_INDEX["equalize"]])
    x = planar(image)
    got = color.apply_tables(x, color.tables(x, kind, torch.zeros(1), STRONG_INDEX))
    assert torch.equal(interleaved(got), each_by_pil(image, TABLES["equalize"], torch.zeros(1)))


def test_histograms_count_every_pixel() -> None:
    images = varied(7, 9, 11)
    counts = color.histograms(planar(images))
    for image, count in zip(images, counts, strict=True):
        assert count.flatten().tolist() == Image.fromarray(image.numpy()).histogram()
