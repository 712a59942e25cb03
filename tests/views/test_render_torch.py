"""Complete views against the same sequence of PIL and torchvision operations, with the same parameters."""

from __future__ import annotations

import pytest
import torch
from images import varied
from pil_views import KEY, MEAN, STD, view_by_pil
from torchvision.transforms import functional as tv

from scan_fast.views import AffineView, PlainView, SimCLRView, StrongView, TorchRenderer, View


@pytest.mark.parametrize("source", [32, 40])
@pytest.mark.parametrize("view", [SimCLRView(size=32), StrongView(size=32), PlainView(size=32)], ids=lambda v: v.kind)
def test_views_equal_pil(view: View, source: int, device: str) -> None:
    n = 240
    images = varied(n, source, source)
    params = view.sample(KEY, 0, torch.arange(n), 0, source, source)
    got = TorchRenderer(MEAN, STD, device).pixels(images, view, params)
    expected = torch.stack([view_by_pil(images[i], view, params, i) for i in range(n)])
    difference = (got.cpu().permute(0, 2, 3, 1) - expected.float()).abs().flatten(1)
    if not isinstance(view, SimCLRView):
        # Without fractional resampling every pixel equals PIL's.
        assert float(difference.max()) == 0
        return
    # A difference of one after the crop can be amplified by the colour operations, above all by the 8-bit quantisation
    # of the hue; most images are equal to the last bit.
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
        # In another batch a matrix product may sum in another order, and a tie is rounded the other way.
        assert float((alone - whole[part]).abs().gt(1e-6).float().mean()) < 0.01


def test_inputs_are_unchanged() -> None:
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


def test_wrong_input_raises() -> None:
    render = TorchRenderer(MEAN, STD, "cpu")
    view = PlainView(size=8)
    params = view.sample(KEY, 0, torch.arange(2), 0, 8, 8)
    with pytest.raises(ValueError, match=r"images must be \(n, H, W, 3\) uint8, got \(2, 3, 8, 8\)"):
        render(torch.zeros((2, 3, 8, 8), dtype=torch.uint8), view, params)
    with pytest.raises(ValueError, match="std above 0"):
        TorchRenderer(MEAN, (0.2, 0.0, 0.2), "cpu")
