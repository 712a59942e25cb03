"""The DALI renderer against PIL: every operation, complete views, and independence of batch and threads."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import pytest
import torch
from images import varied
from PIL import Image
from pil_views import KEY, MEAN, STD, view_by_pil
from torch import Tensor
from torchvision.transforms import functional as tv

from scan_fast.data import DataConfig, open_splits
from scan_fast.errors import MissingPackageError
from scan_fast.ops.augment import Operation
from scan_fast.views import (
    AffineView,
    DaliRenderer,
    FusedRenderer,
    PlainView,
    SimCLRView,
    StrongView,
    TorchRenderer,
    View,
    make_renderer,
    render_dali,
)
from scan_fast.views.parameters import STRONG_OPERATIONS, Params

VIEWS = [SimCLRView, StrongView, PlainView, AffineView]
needs_dali = pytest.mark.skipif(not render_dali.is_installed(), reason=f"DALI is not installed: {render_dali.INSTALL}")


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def dali(request: pytest.FixtureRequest) -> DaliRenderer:
    if not render_dali.is_installed():
        pytest.skip(f"DALI is not installed: {render_dali.INSTALL}")
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return DaliRenderer(MEAN, STD, request.param)


def drawn(view: View, n: int, source: int, epoch: int = 0) -> Params:
    return view.sample(KEY, epoch, torch.arange(n), 0, source, source)


def difference(dali: DaliRenderer, images: Tensor, view: View, params: Params) -> Tensor:
    expected = torch.stack([view_by_pil(images[i], view, params, i) for i in range(len(images))])
    return (dali.pixels(images, view, params).cpu().int() - expected.int()).abs()


# Share of pixel values that must equal PIL's. It is 1 for integer arithmetic. Otherwise DALI's float32, or the 16-bit
# fixed point of a blend, sometimes rounds to the other side of an integer.
STRONG_SHARE = {
    "autocontrast": 0.95,
    "color": 0.9,
    "contrast": 0.998,
    "brightness": 0.999,
    "sharpness": 0.9,
}


@pytest.mark.parametrize("side", [32, 5, 1])
@pytest.mark.parametrize("kind", range(len(STRONG_OPERATIONS)), ids=[name for name, _, _ in STRONG_OPERATIONS])
def test_strong_operations_are_within_one_of_pil(kind: int, side: int, dali: DaliRenderer) -> None:
    name, low, high = STRONG_OPERATIONS[kind]
    view = StrongView(size=side, operations=1, cutout=0, flip=0.5)
    images = varied(120, side, side)
    params = drawn(view, 120, side)
    magnitude = torch.linspace(low, high - 1e-3, 120).unsqueeze(1)
    params["operation"] = torch.full((120, 1), kind)
    params["magnitude"] = magnitude.floor() if name == "posterize" else magnitude
    found = difference(dali, images, view, params)
    assert int(found.max()) <= 1
    assert float((found == 0).float().mean()) >= STRONG_SHARE.get(name, 1.0)


def jitter(n: int, **values: Tensor) -> Params:
    """Return parameters of a SimCLR view that only applies the given operations."""
    params = drawn(SimCLRView(size=32, flip=0, jitter=0, grayscale=0, scale=(1, 1), ratio=(1, 1)), n, 32)
    return {**params, **values}


@pytest.mark.parametrize(
    ("name", "low", "high", "share"),
    [("brightness", 0.6, 1.4, 0.999), ("contrast", 0.6, 1.4, 0.99), ("saturation", 0.6, 1.4, 0.8)],
)
def test_jitter_is_within_one_of_pil(name: str, low: float, high: float, share: float, dali: DaliRenderer) -> None:
    images, view = varied(120, 32, 32), SimCLRView(size=32)
    params = jitter(120, **{name: torch.linspace(low, high, 120)})
    operation: Any = getattr(tv, f"adjust_{name}")
    expected = [tv.pil_to_tensor(operation(Image.fromarray(i.numpy()), float(f))) for i, f in zip(images, params[name])]  # noqa: B905
    found = (dali.pixels(images, view, params).cpu().int() - torch.stack(expected).permute(0, 2, 3, 1).int()).abs()
    assert int(found.max()) <= 1
    assert float((found == 0).float().mean()) >= share


def test_blends_with_large_factors_clip_on_both_sides(dali: DaliRenderer) -> None:
    images, view = varied(60, 32, 32), SimCLRView(size=32, saturation=1, contrast=1)
    for name in ("saturation", "contrast"):
        params = jitter(60, **{name: torch.linspace(0, 2, 60)})
        operation: Any = getattr(tv, f"adjust_{name}")
        factors = params[name].tolist()
        expected = [tv.pil_to_tensor(operation(Image.fromarray(i.numpy()), f)) for i, f in zip(images, factors)]  # noqa: B905
        found = (dali.pixels(images, view, params).cpu().int() - torch.stack(expected).permute(0, 2, 3, 1).int()).abs()
        # A factor in steps of 1/85 changes the farthest colours by two.
        assert int(found.max()) <= 2
        assert float((found <= 1).float().mean()) > 0.99


def test_grayscale_is_within_one_of_pil(dali: DaliRenderer) -> None:
    images = varied(120, 32, 32)
    params = jitter(120, grayscale=torch.ones(120, dtype=torch.bool))
    found = difference(dali, images, SimCLRView(size=32), params)
    assert int(found.max()) <= 1
    assert float((found == 0).float().mean()) > 0.99


def test_hue_is_within_one_of_pil_for_the_whole_colour_cube(dali: DaliRenderer) -> None:
    # Every pair of values with a lattice of the third, 64 x 64 pixels per image; the shift covers the circle.
    values = torch.cat((torch.arange(0, 256, 8), torch.tensor([1, 127, 254, 255])))
    cube = torch.cartesian_prod(values, values, values).to(torch.uint8)
    cube = cube[: len(cube) // 4096 * 4096].view(-1, 64, 64, 3)
    n = len(cube)
    view = SimCLRView(size=64)
    for part in (0.0, 1.0):
        shift = torch.linspace(-0.5 + part * 0.04, 0.46 + part * 0.04, n)
        params = drawn(SimCLRView(size=64, flip=0, jitter=0, grayscale=0, scale=(1, 1), ratio=(1, 1)), n, 64)
        params["hue"] = shift
        expected = [tv.pil_to_tensor(tv.adjust_hue(Image.fromarray(i.numpy()), float(f))) for i, f in zip(cube, shift)]  # noqa: B905
        found = (dali.pixels(cube, view, params).cpu().int() - torch.stack(expected).permute(0, 2, 3, 1).int()).abs()
        assert int(found.max()) <= 1
        # PIL rounds the saturation to 8 bits, a third value besides chroma and hue.
        assert float((found == 0).float().mean()) > 0.85


@pytest.mark.parametrize(
    ("source", "side", "n"), [(32, 32, 120), (8, 8, 120), (24, 40, 60), (64, 32, 40), (96, 24, 24)]
)
def test_crops_are_within_one_of_pil(source: int, side: int, n: int, dali: DaliRenderer) -> None:
    view = SimCLRView(size=side, jitter=0, grayscale=0)
    images = varied(n, source, source)
    params = drawn(view, n, source)
    found = difference(dali, images, view, params)
    # If a crop shrinks, DALI repeats the pixels at its edge for the filter; PIL omits them.
    shrunk = (params["height"] > side) | (params["width"] > side)
    inner = found[:, 2:-2, 2:-2]
    assert int(found[~shrunk].max() if (~shrunk).any() else 0) <= 1
    assert int(inner.max()) <= 1
    assert float((inner == 0).float().mean()) > 0.8


@pytest.mark.parametrize(("source", "side", "n"), [(32, 32, 240), (40, 32, 120), (33, 17, 60)])
@pytest.mark.parametrize("kind", VIEWS, ids=lambda k: k.__name__)
def test_views_agree_with_the_torch_renderer(kind: type, source: int, side: int, n: int, dali: DaliRenderer) -> None:
    view: View = kind(size=side)
    images, params = varied(n, source, source), drawn(kind(size=side), n, source, epoch=3)
    plain = TorchRenderer(MEAN, STD, dali.device)
    expected = plain.pixels(images, view, params).permute(0, 2, 3, 1)
    found = dali.pixels(images, view, params).float() - expected
    # Several operations accumulate rounding errors, and equalizing a flat image amplifies one.
    assert abs(float(found.mean())) < 0.2
    assert float((found.abs() <= 1).float().mean()) > (0.9 if kind is SimCLRView else 0.99)
    assert float((found.abs() <= 4).float().mean()) > (0.95 if kind is SimCLRView else 0.995)
    values, expected_values = dali(images, view, params), plain(images, view, params)
    assert values.shape == expected_values.shape and values.is_contiguous(memory_format=torch.channels_last)
    same = (found == 0).permute(0, 3, 1, 2)
    assert torch.equal(values[same], expected_values[same])


def test_pixel_values_are_distributed_as_with_pil(dali: DaliRenderer) -> None:
    # One image, many views: the pixel values of each channel are distributed as with PIL.
    image = varied(1, 32, 32)
    for view in (SimCLRView(size=32), StrongView(size=32, cutout=0)):
        n = 400
        images = image.expand(n, -1, -1, -1).contiguous()
        params = drawn(view, n, 32)
        expected = torch.stack([view_by_pil(images[i], view, params, i) for i in range(n)]).reshape(-1, 3).float()
        got = dali.pixels(images, view, params).cpu().reshape(-1, 3).float()
        assert float((got.mean(0) - expected.mean(0)).abs().max()) < 0.2
        assert float((got.std(0) - expected.std(0)).abs().max()) < 0.2
        points = torch.arange(0, 255, 5.0)
        share, expected_share = ((x.unsqueeze(2) <= points).float().mean(0) for x in (got, expected))
        assert float((share - expected_share).abs().max()) < 0.01


@pytest.mark.parametrize("kind", VIEWS, ids=lambda k: k.__name__)
def test_bits_do_not_depend_on_batch_or_threads(kind: type, dali: DaliRenderer, monkeypatch: Any) -> None:
    view: View = kind(size=24)
    images = varied(36, 32, 32)
    samples = torch.arange(36)
    whole = dali(images, view, drawn(view, 36, 32))
    kept = whole.clone()
    other = DaliRenderer(MEAN, STD, dali.device, threads=3)
    for part, renderer in ((samples[5:6], dali), (samples[[30, 2, 11]], other), (samples, other)):
        params = view.sample(KEY, 0, part, 0, 32, 32)
        assert torch.equal(renderer(images[part], view, params), whole[part])
    monkeypatch.setattr(render_dali, "_RUN_IMAGES", 10)
    assert torch.equal(DaliRenderer(MEAN, STD, dali.device)(images, view, drawn(view, 36, 32)), whole)
    # A later run must not change the result of an earlier one.
    assert torch.equal(whole, kept)


def test_the_graphs_of_a_gpu_give_the_same_pixels_on_the_cpu(monkeypatch: Any) -> None:
    pytest.importorskip("nvidia.dali", reason=f"DALI is not installed: {render_dali.INSTALL}")
    from scan_fast.views import dali_graphs

    view = SimCLRView(size=32)
    images, params = varied(60, 32, 32), jitter(60, contrast=torch.linspace(0.6, 1.4, 60))
    plain = DaliRenderer(MEAN, STD, "cpu").pixels(images, view, params)
    build = dali_graphs.block_pipeline
    monkeypatch.setattr(dali_graphs, "block_pipeline", lambda *a, **k: build(*a, **{"on_device": True, **k}))
    found = (DaliRenderer(MEAN, STD, "cpu").pixels(images, view, params).int() - plain.int()).abs()
    assert int(found.max()) <= 1


def test_bfloat16_is_the_rounded_float32_and_inputs_are_unchanged(dali: DaliRenderer) -> None:
    for view in (SimCLRView(size=16), StrongView(size=16, cutout=8), AffineView(size=16), PlainView(size=16)):
        images, params = varied(20, 16, 16), drawn(view, 20, 16)
        before, kept = images.clone(), {k: v.clone() for k, v in params.items()}
        half = DaliRenderer(MEAN, STD, dali.device, torch.bfloat16)(images, view, params)
        assert torch.equal(half, dali(images, view, params).to(torch.bfloat16))
        assert torch.equal(images, before) and all(torch.equal(kept[k], params[k]) for k in params)


def test_empty_batches_and_wrong_input(dali: DaliRenderer) -> None:
    for view in (SimCLRView(size=8), StrongView(size=8), AffineView(size=8), PlainView(size=8)):
        assert dali(torch.empty((0, 16, 16, 3), dtype=torch.uint8), view, drawn(view, 0, 16)).shape == (0, 3, 8, 8)
    with pytest.raises(ValueError, match=r"images must be \(n, H, W, 3\) uint8"):
        dali(torch.zeros((2, 3, 8, 8), dtype=torch.uint8), PlainView(size=8), drawn(PlainView(size=8), 2, 8))
    with pytest.raises(ValueError, match="std above 0"):
        DaliRenderer(MEAN, (0.2, 0.0, 0.2), "cpu")
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16"):
        DaliRenderer(MEAN, STD, "cpu", torch.float64)


@needs_dali
def test_configuration_selects_dali() -> None:
    config = DataConfig(source="digits", renderer="dali")
    assert isinstance(make_renderer(config, open_splits(config), torch.device("cpu")), DaliRenderer)
    automatic = config.model_copy(update={"renderer": "auto"})
    assert isinstance(make_renderer(automatic, open_splits(config), torch.device("cpu")), FusedRenderer)


def test_without_dali_the_error_names_the_package(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = DataConfig(source="digits", renderer="dali")
    with pytest.raises(MissingPackageError, match="pip install nvidia-dali-cuda130"):
        make_renderer(config, open_splits(config), torch.device("cpu"))


@needs_dali
def test_every_operation_of_the_recipes_has_a_graph() -> None:
    from scan_fast.views import dali_graphs

    for operation in set(Operation) - {Operation.IDENTITY, Operation.EQUALIZE}:
        assert hasattr(dali_graphs._Graph, operation.name.lower())
