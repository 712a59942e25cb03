"""The fused renderer: views equal PIL's, agree with the torch renderer, and depend only on their parameters."""

from __future__ import annotations

import pytest
import torch
from images import varied
from pil_views import KEY, MEAN, STD, view_by_pil

from scan_fast.data import DataConfig, open_splits
from scan_fast.errors import DataError
from scan_fast.ops import native
from scan_fast.views import (
    AffineView,
    FusedRenderer,
    PlainView,
    SimCLRView,
    StrongView,
    TorchRenderer,
    View,
    make_renderer,
)
from scan_fast.views.renderers import automatic_renderer


@pytest.fixture
def device(device: str) -> str:
    """Restrict to devices with a compiled kernel."""
    if not native.has_kernel("augment", device):
        pytest.skip(f"no compiled kernel for {device}")
    return device


SIZES = [(32, 32, 240), (40, 32, 120), (8, 8, 240), (96, 96, 36), (64, 32, 60), (33, 17, 60)]
VIEWS = [SimCLRView, StrongView, PlainView, AffineView]


@pytest.mark.parametrize(("source", "side", "n"), SIZES)
@pytest.mark.parametrize("kind", VIEWS[:3], ids=lambda k: k.__name__)
def test_pixels_equal_pil(kind: type, source: int, side: int, n: int, device: str) -> None:
    view: View = kind(size=side)
    images = varied(n, source, source)
    params = view.sample(KEY, 0, torch.arange(n), 0, source, source)
    got = FusedRenderer(MEAN, STD, device).pixels(images, view, params).cpu()
    assert torch.equal(got, torch.stack([view_by_pil(images[i], view, params, i) for i in range(n)]))


@pytest.mark.parametrize(("source", "side", "n"), SIZES)
@pytest.mark.parametrize("kind", VIEWS, ids=lambda k: k.__name__)
def test_views_agree_with_the_torch_renderer(kind: type, source: int, side: int, n: int, device: str) -> None:
    view: View = kind(size=side)
    images = varied(n, source, source)
    params = view.sample(KEY, 3, torch.arange(n), 1, source, source)
    fused, plain = FusedRenderer(MEAN, STD, device), TorchRenderer(MEAN, STD, device)
    pixels = fused.pixels(images, view, params).float()
    expected = plain.pixels(images, view, params).permute(0, 2, 3, 1)
    difference = (pixels - expected).abs()
    values, expected_values = fused(images, view, params), plain(images, view, params)
    assert values.dtype == torch.float32 and values.is_contiguous(memory_format=torch.channels_last)
    if isinstance(view, (StrongView, PlainView)):
        assert torch.equal(pixels, expected)
        assert torch.equal(values, expected_values)
        return
    # The torch renderer resamples in float32, so a tie is sometimes rounded the other way; later colour operations can
    # amplify that.
    assert float((difference == 0).float().mean()) > 0.98
    assert float((difference <= 1).float().mean()) > 0.997
    same = (difference == 0).permute(0, 3, 1, 2)
    assert torch.equal(values[same], expected_values[same])


def test_crops_alone_differ_from_the_torch_renderers_only_at_ties(device: str) -> None:
    view = SimCLRView(size=32, jitter=0, grayscale=0)
    images = varied(120, 64, 64)
    params = view.sample(KEY, 0, torch.arange(120), 0, 64, 64)
    pixels = FusedRenderer(MEAN, STD, device).pixels(images, view, params)
    expected = TorchRenderer(MEAN, STD, device).pixels(images, view, params).permute(0, 2, 3, 1)
    difference = (pixels.float() - expected).abs()
    # A tie in either pass changes a value by one; ties in both passes at one pixel are rare.
    assert float(difference.max()) <= 2
    assert float((difference > 1).float().mean()) < 1e-4
    assert float((difference > 0).float().mean()) < 0.02


@pytest.mark.parametrize("kind", VIEWS, ids=lambda k: k.__name__)
def test_bits_do_not_depend_on_batch_threads_or_gather(kind: type) -> None:
    view: View = kind(size=24)
    images = varied(36, 32, 32)
    render = FusedRenderer(MEAN, STD, "cpu")
    samples = torch.arange(36)
    whole = render(images, view, view.sample(KEY, 0, samples, 0, 32, 32))
    threads = torch.get_num_threads()
    try:
        for part, used in ((samples[5:6], 1), (samples[[30, 2, 11]], 3), (samples, 1)):
            torch.set_num_threads(used)
            params = view.sample(KEY, 0, part, 0, 32, 32)
            assert torch.equal(render(images[part], view, params), whole[part])
            assert torch.equal(render(images, view, params, indices=part), whole[part])
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_is_the_rounded_float32(device: str) -> None:
    images = varied(20, 16, 16)
    view = StrongView(size=16, cutout=8)
    params = view.sample(KEY, 0, torch.arange(20), 0, 16, 16)
    single = FusedRenderer(MEAN, STD, device)(images, view, params)
    half = FusedRenderer(MEAN, STD, device, torch.bfloat16)(images, view, params)
    assert torch.equal(half, single.to(torch.bfloat16))


def test_inputs_are_unchanged() -> None:
    images = varied(12, 16, 16)
    before = images.clone()
    for view in (SimCLRView(size=16), StrongView(size=16), AffineView(size=16), PlainView(size=16)):
        params = view.sample(KEY, 0, torch.arange(12), 0, 16, 16)
        kept = {k: v.clone() for k, v in params.items()}
        FusedRenderer(MEAN, STD, "cpu")(images, view, params)
        assert torch.equal(images, before)
        assert all(torch.equal(kept[k], params[k]) for k in params)


def test_affine_view_without_strength_changes_nothing(device: str) -> None:
    view = AffineView(size=8, degrees=0, translate=0, scale=(1, 1), shear=0, brightness=0, contrast=0)
    images = varied(24, 8, 8)
    pixels = FusedRenderer(MEAN, STD, device).pixels(images, view, view.sample(KEY, 0, torch.arange(24), 0, 8, 8))
    assert torch.equal(pixels.cpu(), images)


@pytest.mark.parametrize("operations", [0, 1, 7])
def test_any_number_of_strong_operations(operations: int, device: str) -> None:
    view = StrongView(size=20, operations=operations)
    images = varied(30, 20, 20)
    params = view.sample(KEY, 0, torch.arange(30), 0, 20, 20)
    got = FusedRenderer(MEAN, STD, device).pixels(images, view, params).cpu()
    assert torch.equal(got, torch.stack([view_by_pil(images[i], view, params, i) for i in range(30)]))


def test_empty_batches_and_wrong_input() -> None:
    render = FusedRenderer(MEAN, STD, "cpu")
    for view in (SimCLRView(size=8), StrongView(size=8), AffineView(size=8), PlainView(size=8)):
        params = view.sample(KEY, 0, torch.arange(0), 0, 16, 16)
        assert render(torch.empty((0, 16, 16, 3), dtype=torch.uint8), view, params).shape == (0, 3, 8, 8)
    params = PlainView(size=8).sample(KEY, 0, torch.arange(2), 0, 8, 8)
    with pytest.raises(ValueError, match=r"images must be \(N, H, W, 3\) uint8"):
        render(torch.zeros((2, 3, 8, 8), dtype=torch.uint8), PlainView(size=8), params)
    with pytest.raises(ValueError, match="std above 0"):
        FusedRenderer(MEAN, (0.2, 0.0, 0.2), "cpu")
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        FusedRenderer(MEAN, STD, "cpu", torch.float64)


def test_configuration_selects_the_renderer() -> None:
    config = DataConfig(source="digits")
    splits = open_splits(config)
    cpu = torch.device("cpu")
    assert automatic_renderer("cpu") == "fused"
    assert isinstance(make_renderer(config, splits, cpu), FusedRenderer)
    assert isinstance(make_renderer(config.model_copy(update={"renderer": "fused"}), splits, cpu), FusedRenderer)
    assert isinstance(make_renderer(config.model_copy(update={"renderer": "torch"}), splits, cpu), TorchRenderer)


def test_an_unavailable_renderer_raises() -> None:
    meta = torch.device("meta")
    assert automatic_renderer("meta") == "torch"
    config = DataConfig(source="digits", renderer="fused")
    with pytest.raises(DataError, match=r"no compiled kernel for meta here; use data\.renderer=torch or auto"):
        make_renderer(config, open_splits(config), meta)
