"""Whole views against the same sequence of PIL and torchvision operations, with the same parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image, ImageEnhance, ImageOps
from test_geometry import PIL_OPERATIONS
from torchvision.transforms import functional as tv

from scan_fast.data import AffineView, PlainView, SimCLRView, StrongView, TorchRenderer, View
from scan_fast.data.random import stream_key
from scan_fast.data.views import STRONG_OPERATIONS

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
KEY = stream_key(5, "pretext")

STRONG = {
    "identity": lambda im, v: im,
    "autocontrast": lambda im, v: ImageOps.autocontrast(im),
    "equalize": lambda im, v: ImageOps.equalize(im),
    "solarize": lambda im, v: ImageOps.solarize(im, v),
    "posterize": lambda im, v: ImageOps.posterize(im, int(v)),
    "color": lambda im, v: ImageEnhance.Color(im).enhance(v),
    "contrast": lambda im, v: ImageEnhance.Contrast(im).enhance(v),
    "brightness": lambda im, v: ImageEnhance.Brightness(im).enhance(v),
    "sharpness": lambda im, v: ImageEnhance.Sharpness(im).enhance(v),
    **PIL_OPERATIONS,
}
JITTER = [
    ("brightness", tv.adjust_brightness),
    ("contrast", tv.adjust_contrast),
    ("saturation", tv.adjust_saturation),
    ("hue", tv.adjust_hue),
]


def by_pil(pixels: torch.Tensor, view: View, p: dict[str, torch.Tensor], i: int) -> torch.Tensor:
    """Render one image as the reference's transforms do; the crop is taken horizontally first, see test_geometry."""
    top, left, h, w = (int(p[k][i]) for k in ("top", "left", "height", "width"))
    image = tv.crop(Image.fromarray(pixels.numpy()), top, left, h, w)
    for size in ((view.side, h), (view.side, view.side)):
        image = image.resize(size, Image.Resampling.BILINEAR)
    if bool(p["flip"][i]):
        image = tv.hflip(image)
    if isinstance(view, SimCLRView):
        for index in p["order"][i].tolist():
            name, operation = JITTER[index]
            if float(p["brightness"][i]) != 1:
                image = operation(image, float(p[name][i]))
        if bool(p["grayscale"][i]):
            image = tv.to_grayscale(image, num_output_channels=3)
    if isinstance(view, StrongView):
        for index, value in zip(p["operation"][i].tolist(), p["magnitude"][i].tolist(), strict=True):
            image = STRONG[STRONG_OPERATIONS[index][0]](image, value)
    return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("source", [32, 40])
@pytest.mark.parametrize("view", [SimCLRView(size=32), StrongView(size=32), PlainView(size=32)], ids=lambda v: v.kind)
def test_views_equal_pil(view: View, source: int, device: str) -> None:
    n = 240
    images = varied(n, source, source)
    params = view.sample(KEY, 0, torch.arange(n), 0, source, source)
    got = TorchRenderer(MEAN, STD, device).pixels(images, view, params)
    expected = torch.stack([by_pil(images[i], view, params, i) for i in range(n)])
    difference = (got.cpu().permute(0, 2, 3, 1) - expected.float()).abs().flatten(1)
    if not isinstance(view, SimCLRView):
        # No resampling by fractions: every pixel of every image is PIL's.
        assert float(difference.max()) == 0
        return
    # One level of the crop can be carried further by the colour operations after it, above all by the hue's 8-bit
    # quantisation; most images are equal to the last bit.
    assert float((difference == 0).float().mean()) > 0.97
    assert float((difference <= 2).float().mean()) > 0.9995


def test_result_is_normalised_channels_last_and_cut_out(device: str) -> None:
    images = varied(50, 32, 32)
    view = StrongView(size=32, operations=0, flip=0)
    params = view.sample(KEY, 0, torch.arange(50), 0, 32, 32)
    got = TorchRenderer(MEAN, STD, device)(images, view, params)
    assert got.dtype == torch.float32 and got.device.type == device
    assert got.is_contiguous(memory_format=torch.channels_last)
    for i in range(50):
        expected = tv.normalize(tv.to_tensor(images[i].numpy()), MEAN, STD)
        top, left, bottom, right = params["cutout"][i].tolist()
        expected[:, top:bottom, left:right] = 0
        torch.testing.assert_close(got[i].cpu(), expected, rtol=0, atol=3e-6)


def test_bfloat16_is_the_rounded_float32() -> None:
    images = varied(20, 16, 16)
    view = SimCLRView(size=16)
    params = view.sample(KEY, 0, torch.arange(20), 0, 16, 16)
    single = TorchRenderer(MEAN, STD, "cpu")(images, view, params)
    half = TorchRenderer(MEAN, STD, "cpu", torch.bfloat16)(images, view, params)
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, single.to(torch.bfloat16))


@pytest.mark.parametrize(
    "view",
    [SimCLRView(size=24), StrongView(size=24), AffineView(size=24, cutout=8), PlainView(size=24)],
    ids=lambda v: v.kind,
)
def test_images_do_not_depend_on_the_batch(view: View) -> None:
    images = varied(36, 32, 32)
    render = TorchRenderer(MEAN, STD, "cpu")
    samples = torch.arange(36)
    whole = render(images, view, view.sample(KEY, 0, samples, 0, 32, 32))
    for part in (samples[5:6], samples[[30, 2, 11]]):
        alone = render(images[part], view, view.sample(KEY, 0, part, 0, 32, 32))
        # A matrix product may sum in another order in another batch; a tie then falls the other way, by one level.
        assert float((alone - whole[part]).abs().gt(1e-6).float().mean()) < 0.01


def test_inputs_are_left_alone() -> None:
    images = varied(12, 16, 16)
    before = images.clone()
    for view in (SimCLRView(size=16), StrongView(size=16), AffineView(size=16), PlainView(size=16)):
        params = view.sample(KEY, 0, torch.arange(12), 0, 16, 16)
        kept = {k: v.clone() for k, v in params.items()}
        TorchRenderer(MEAN, STD, "cpu")(images, view, params)
        assert torch.equal(images, before)
        assert all(torch.equal(kept[k], params[k]) for k in params)


def test_affine_view_without_strength_changes_nothing() -> None:
    view = AffineView(size=8, degrees=0, translate=0, scale=(1, 1), shear=0, brightness=0, contrast=0)
    images = varied(24, 8, 8)
    pixels = TorchRenderer(MEAN, STD, "cpu").pixels(images, view, view.sample(KEY, 0, torch.arange(24), 0, 8, 8))
    assert torch.equal(pixels.permute(0, 2, 3, 1).to(torch.uint8), images)


def test_an_empty_batch_renders_to_an_empty_batch() -> None:
    images = torch.empty((0, 16, 16, 3), dtype=torch.uint8)
    for view in (SimCLRView(size=8), StrongView(size=8), AffineView(size=8), PlainView(size=8)):
        out = TorchRenderer(MEAN, STD, "cpu")(images, view, view.sample(KEY, 0, torch.arange(0), 0, 16, 16))
        assert out.shape == (0, 3, 8, 8)


def test_wrong_input_is_named() -> None:
    render = TorchRenderer(MEAN, STD, "cpu")
    view = PlainView(size=8)
    params = view.sample(KEY, 0, torch.arange(2), 0, 8, 8)
    with pytest.raises(ValueError, match=r"images must be \(n, H, W, 3\) uint8, got \(2, 3, 8, 8\)"):
        render(torch.zeros((2, 3, 8, 8), dtype=torch.uint8), view, params)
    with pytest.raises(ValueError, match="std above 0"):
        TorchRenderer(MEAN, (0.2, 0.0, 0.2), "cpu")
