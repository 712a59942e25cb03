"""Views per second: the fused renderer, the torch renderer, and what people use: ``python -m benchmarks.views``.

On the CPU every contender has one thread and its CPU time is counted, so that a busy machine does not matter; on CUDA
eight finished batches are timed. Contenders take turns; the figures are the median and the range over the rounds. Ours
draw their parameters within the measurement, unless noted otherwise. torchvision on PIL images is given the same
parameters, so that its images can be compared; it does not have to draw. The line of equal pixel values gives their
share. (Newer Pillows shrink tall crops vertically first, which changes values by one; ours always take the horizontal
pass first.)

torchvision v2 on a batched tensor draws one set of parameters for the whole batch. Statistically that is another
augmentation; it is measured for its speed alone. For the strong view its RandAugment with as many operations is used.

DALI renders chunks of several batches, because a run of it has a high fixed cost, and in a second line a batch at a
time, as in training. "DALI's own RandAugment" is its `auto_augment.rand_augment` with as many operations, but other
parameters and arithmetic.

``--photos FOLDER`` measures instead the rate at which the boxes of two SimCLR views of 224 pixels are cut out of the
JPEG files of a folder: by the pool of threads, of which one decodes here, and by DALI.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

from scan_fast.data.datasets import Triple
from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource
from scan_fast.data.folders import find_images
from scan_fast.ops.augment import augment
from scan_fast.random import stream_key
from scan_fast.views import DaliRenderer, FusedRenderer, SimCLRView, StrongView, TorchRenderer, render_dali
from scan_fast.views.parameters import STRONG_OPERATIONS, Params
from scan_fast.views.render_fused import recipes
from scan_fast.views.renderers import automatic_renderer

from .environment import describe
from .files import write_json

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
KEY = stream_key(0, "benchmark")
# A chunk of DALI: 4,096 images of 32 x 32 pixels.
DALI_PIXELS = 1 << 22
PIL = "torchvision on PIL, parameters given"
KERNEL = "fused, recipes given"
JITTER = (
    ("brightness", tv.adjust_brightness),
    ("contrast", tv.adjust_contrast),
    ("saturation", tv.adjust_saturation),
    ("hue", tv.adjust_hue),
)
STRONG: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, _: image,
    "autocontrast": lambda image, _: ImageOps.autocontrast(image),
    "equalize": lambda image, _: ImageOps.equalize(image),
    "rotate": lambda image, v: image.rotate(v),
    "solarize": lambda image, v: ImageOps.solarize(image, math.ceil(v)),
    "color": lambda image, v: ImageEnhance.Color(image).enhance(v),
    "contrast": lambda image, v: ImageEnhance.Contrast(image).enhance(v),
    "brightness": lambda image, v: ImageEnhance.Brightness(image).enhance(v),
    "sharpness": lambda image, v: ImageEnhance.Sharpness(image).enhance(v),
    "shear_x": lambda image, v: _affine(image, 1, v, 0, 0, 1, 0),
    "shear_y": lambda image, v: _affine(image, 1, 0, 0, v, 1, 0),
    "translate_x": lambda image, v: _affine(image, 1, 0, v * image.width, 0, 1, 0),
    "translate_y": lambda image, v: _affine(image, 1, 0, 0, 0, 1, v * image.height),
    "posterize": lambda image, v: ImageOps.posterize(image, int(v)),
}


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def pil_pixels(pixels: Tensor, view: SimCLRView | StrongView, params: Params, i: int) -> Image.Image:
    """Render one view of one image before normalisation with torchvision and PIL."""
    box = [int(params[name][i]) for name in ("top", "left", "height", "width")]
    image = tv.resized_crop(Image.fromarray(pixels.numpy()), *box, [view.side, view.side], antialias=True)
    if bool(params["flip"][i]):
        image = tv.hflip(image)
    if isinstance(view, StrongView):
        for kind, value in zip(params["operation"][i].tolist(), params["magnitude"][i].tolist(), strict=True):
            image = STRONG[STRONG_OPERATIONS[kind][0]](image, value)
        return image
    if float(params["brightness"][i]) != 1:
        for kind in params["order"][i].tolist():
            name, operation = JITTER[kind]
            image = operation(image, float(params[name][i]))
    return tv.to_grayscale(image, 3) if bool(params["grayscale"][i]) else image


def pil_view(pixels: Tensor, view: SimCLRView | StrongView, params: Params, i: int) -> Tensor:
    """Render one normalised view of one image with torchvision and PIL."""
    out = tv.normalize(tv.to_tensor(pil_pixels(pixels, view, params, i)), MEAN, STD)
    if "cutout" in params:
        top, left, bottom, right = params["cutout"][i].tolist()
        out[:, top:bottom, left:right] = 0
    return out


def lightly_transform() -> Any:
    """Return lightly's transform; None if lightly or something that it imports is missing."""
    try:
        from lightly.transforms.simclr_transform import SimCLRViewTransform
    except ImportError as error:
        print(f"\nlightly is left out: {error}")
        return None
    return SimCLRViewTransform


def lightly_arguments(view: SimCLRView, mean: Triple, std: Triple) -> dict[str, Any]:
    """Return the arguments of lightly's transforms that make them draw this view."""
    return {
        "input_size": view.side,
        "cj_prob": view.jitter,
        "cj_strength": 1.0,
        "cj_bright": view.brightness,
        "cj_contrast": view.contrast,
        "cj_sat": view.saturation,
        "cj_hue": view.hue,
        "min_scale": view.scale[0],
        "random_gray_scale": view.grayscale,
        "gaussian_blur": 0.0,
        "hf_prob": view.flip,
        "normalize": {"mean": list(mean), "std": list(std)},
    }


def stock_rand_augment(images: Tensor, view: StrongView) -> Callable[[], Any]:
    """Return a run of DALI's auto_augment.rand_augment over these images, normalised and cropped as the view."""
    from nvidia.dali import fn, pipeline_def, types
    from nvidia.dali.auto_aug import rand_augment

    place = "cpu" if images.device.type == "cpu" else "gpu"

    @pipeline_def(
        batch_size=len(images),
        num_threads=torch.get_num_threads(),
        device_id=None if place == "cpu" else 0,
        prefetch_queue_depth=1,
        enable_conditionals=True,
        seed=0,
    )
    def build() -> Any:
        x = fn.external_source(name="images", device=place, layout="HWC")
        x = rand_augment.rand_augment(x, n=view.operations, m=9, fill_value=0)
        return fn.crop_mirror_normalize(
            x,
            crop=(view.side, view.side),
            mirror=fn.random.coin_flip(probability=view.flip),
            mean=[255 * m for m in MEAN],
            std=[255 * s for s in STD],
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    pipeline = build()
    pipeline.build()
    array: Any = images.numpy() if place == "cpu" else images

    def run() -> Any:
        pipeline.feed_input("images", array)
        return pipeline.run()

    return run


def contenders(images: Tensor, view: SimCLRView | StrongView, device: str) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return by name the number of views that a call makes, and the call."""
    n, height = images.shape[:2]
    samples = torch.arange(n)
    params = view.sample(KEY, 0, samples, 0, height, height)
    on_device = images.to(device)
    torch_renderer = TorchRenderer(MEAN, STD, device)

    def drawn() -> Params:
        return view.sample(KEY, 0, samples, 0, height, height)

    calls: dict[str, tuple[int, Callable[[], Any]]] = {}
    if automatic_renderer(device) == "fused":
        fused = FusedRenderer(MEAN, STD, device)
        calls["fused"] = (n, lambda: fused(on_device, view, drawn()))
        calls["fused, parameters given"] = (n, lambda: fused(on_device, view, params))
        written, scale, shift = recipes(view, params), [1 / (255 * s) for s in STD], [-1.0, -1.0, -1.0]
        calls[KERNEL] = (n, lambda: augment(on_device, written, view.side, scale, shift, torch.float32))
    if render_dali.is_installed():
        repeats = max(1, DALI_PIXELS // (n * view.side**2))
        chunk = on_device.repeat(repeats, 1, 1, 1)
        numbers = torch.arange(len(chunk))
        dali = DaliRenderer(MEAN, STD, device)
        calls["dali"] = (len(chunk), lambda: dali(chunk, view, view.sample(KEY, 0, numbers, 0, height, height)))
        if repeats > 1:
            calls["dali, a batch at a time"] = (n, lambda: dali(on_device, view, drawn()))
        if isinstance(view, StrongView):
            calls["DALI's own RandAugment"] = (len(chunk), stock_rand_augment(chunk, view))
    else:
        print(f"\nDALI is left out: {render_dali.INSTALL}")
    calls["torch"] = (n, lambda: torch_renderer(on_device, view, drawn()))
    few = max(8, n // 8)
    calls[PIL] = (
        few,
        lambda: torch.stack([pil_view(images[i], view, params, i) for i in range(few)]),
    )
    planar = on_device.permute(0, 3, 1, 2).contiguous()
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    if isinstance(view, SimCLRView):
        jitter = v2.ColorJitter(view.brightness, view.contrast, view.saturation, view.hue)
        batched = v2.Compose(
            [
                v2.RandomResizedCrop(view.side, view.scale, view.ratio, antialias=True),
                v2.RandomHorizontalFlip(view.flip),
                v2.RandomApply([jitter], view.jitter),
                v2.RandomGrayscale(view.grayscale),
                *finish,
            ]
        )
    else:
        batched = v2.Compose(
            [v2.RandomHorizontalFlip(view.flip), v2.CenterCrop(view.side), v2.RandAugment(view.operations), *finish]
        )
    calls["torchvision v2, one parameter set per batch"] = (n, lambda: batched(planar))
    if isinstance(view, SimCLRView) and (lightly := lightly_transform()) is not None:
        transform = lightly(**lightly_arguments(view, MEAN, STD))
        arrays = images[:few].numpy()
        calls["lightly on PIL"] = (few, lambda: torch.stack([transform(Image.fromarray(a)) for a in arrays]))
    return calls


def photo_contenders(folder: Path, device: str, n: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Return by name the number of views of photographs that a call cuts out of n files, and the call."""
    names = find_images(folder)[0]
    view = SimCLRView(size=224)
    images = ImagePaths(names, folder)
    exact, scaled = (
        FileSource(images, None, view.side, workers=1, resident=False, scaled=scaled, on_error="skip").files
        for scaled in (False, True)
    )
    n = min(n, len(exact))
    indices = torch.arange(n)
    drawn = [view.sample(KEY, 0, indices, number, view.side, view.side) for number in range(2)]
    boxes = [torch.stack([params[name] for name in ("top", "left", "height", "width")], dim=1) for params in drawn]
    arguments = (indices, view.side, boxes, [view.side, view.side])
    calls: dict[str, tuple[int, Callable[[], Any]]] = {
        "pool": (2 * n, lambda: exact.cut(*arguments)),
        "pool, decode=scaled": (2 * n, lambda: scaled.cut(*arguments)),
    }
    if render_dali.is_installed():
        dali = DaliRenderer(MEAN, STD, device, decodes=True)
        calls["dali"] = (2 * n, lambda: dali.cut(exact, *arguments))
        few = slice(0, 64)
        parts = [several[few] for several in boxes]
        ours = dali.cut(exact, indices[few], view.side, parts, [view.side] * 2)
        pools = exact.cut(indices[few], view.side, parts, [view.side] * 2)
        apart = torch.cat([(a.cpu().int() - b.int()).abs() for a, b in zip(ours, pools, strict=True)])
        share, worst = float((apart <= 1).float().mean()), int(apart[:, 2:-2, 2:-2].max())
        print(f"\ndali against the pool: {share:.3%} differ by one at most; worst difference {worst}, edges aside")
    return calls


def measure(
    calls: dict[str, tuple[int, Callable[[], Any]]], device: str, rounds: int, window: float
) -> dict[str, dict[str, float]]:
    """Return views per second by contender: median, lowest and highest over the rounds."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    rates: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, (views, call) in calls.items():
            repeats, begin, seconds = 0, clock(), 0.0
            while seconds < window:
                for _ in range(8 if device == "cuda" else 1):
                    call()
                    repeats += 1
                if device == "cuda":
                    torch.cuda.synchronize()
                seconds = clock() - begin
            if turn > 0:  # the first warms up
                rates[name].append(repeats * views / seconds)
    return {
        name: {"views_per_second": statistics.median(found), "lowest": min(found), "highest": max(found)}
        for name, found in rates.items()
    }


def parity(images: Tensor, view: SimCLRView | StrongView, device: str) -> dict[str, float]:
    """Return the share of pixel values in which two renderers agree, on the first images."""
    few = images[:64]
    height = images.shape[1]
    params = view.sample(KEY, 0, torch.arange(len(few)), 0, height, height)
    pixels = {
        "torch": TorchRenderer(MEAN, STD, device).pixels(few, view, params).cpu().permute(0, 2, 3, 1).to(torch.uint8),
        "PIL": torch.from_numpy(np.stack([np.array(pil_pixels(few[i], view, params, i)) for i in range(len(few))])),
    }
    pairs = [("torch", "PIL")]
    if automatic_renderer(device) == "fused":
        pixels["fused"] = FusedRenderer(MEAN, STD, device).pixels(few, view, params).cpu()
        pairs = [("fused", "PIL"), ("fused", "torch"), *pairs]
    if render_dali.is_installed():
        pixels["dali"] = DaliRenderer(MEAN, STD, device).pixels(few, view, params).cpu()
        pairs = [("dali", "PIL"), *pairs]
        near = (pixels["dali"].int() - pixels["PIL"].int()).abs() <= 1
        return _shares(pixels, pairs) | {"dali within one of PIL": float(near.float().mean())}
    return _shares(pixels, pairs)


def _shares(pixels: dict[str, Tensor], pairs: list[tuple[str, str]]) -> dict[str, float]:
    return {f"{a} = {b}": float((pixels[a] == pixels[b]).float().mean()) for a, b in pairs}


def pictures(n: int, side: int) -> Tensor:
    """Return smooth images with noise, (n, side, side, 3) uint8."""
    g = torch.Generator().manual_seed(0)
    coarse = torch.rand((n, 3, 6, 6), generator=g)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    noisy = 255 * smooth + 12 * torch.randn((n, 3, side, side), generator=g)
    return noisy.clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.views", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--quick", action="store_true", help="few images and one short round: a rehearsal, not a result"
    )
    parser.add_argument("--photos", type=Path, metavar="FOLDER", help="measure only how fast views are cut out")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    device: str = arguments.device
    if device == "cpu":
        torch.set_num_threads(1)
    if arguments.photos:
        for name, rate in measure(
            photo_contenders(arguments.photos, device, 64 if device == "cpu" else 512), device, arguments.rounds, 0.1
        ).items():
            value, low, high = rate["views_per_second"], rate["lowest"], rate["highest"]
            print(f"  {name:<44} {value:>11,.0f} views/s  ({low:,.0f} to {high:,.0f})")
        return
    results = []
    sizes = ((32, 32, 512), (256, 224, 32)) if device == "cpu" else ((32, 32, 4096), (256, 224, 512))
    rounds, window = arguments.rounds, 0.1
    if arguments.quick:
        sizes, rounds, window = ((32, 32, 16), (64, 48, 8)), 1, 0.001
    for source, side, n in sizes:
        images = pictures(n, source)
        for view in (SimCLRView(size=side), StrongView(size=side)):
            rates = measure(contenders(images, view, device), device, rounds, window)
            agreement = parity(images, view, device)
            results.append({"view": view.kind, "source": source, "side": side, "rates": rates, "parity": agreement})
            base = rates[PIL]["views_per_second"]
            print(f"\n{view.kind}, {source} -> {side}, {device}{', one thread' if device == 'cpu' else ''}")
            for name, rate in rates.items():
                value, low, high = rate["views_per_second"], rate["lowest"], rate["highest"]
                print(f"  {name:<44} {value:>11,.0f} views/s  {value / base:6.1f} x  ({low:,.0f} to {high:,.0f})")
            print("  equal pixel values: " + ", ".join(f"{pair} {share:.3%}" for pair, share in agreement.items()))
    if arguments.json:
        result = {"benchmark": "views", "title": "Views of a batch", "device": device, "environment": describe(device)}
        result["quick"] = arguments.quick
        write_json(arguments.json, result | {"results": results})


if __name__ == "__main__":
    main()
