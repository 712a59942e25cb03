"""The same operations and views made with PIL and torchvision, as an oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional as tv

from scan_fast.random import stream_key
from scan_fast.views import SimCLRView, StrongView, View
from scan_fast.views.parameters import STRONG_OPERATIONS

PilOperation = Callable[[Image.Image, float], Image.Image]


def planar(images: torch.Tensor, device: str = "cpu") -> torch.Tensor:
    return images.permute(0, 3, 1, 2).float().to(device)


def interleaved(x: torch.Tensor) -> torch.Tensor:
    assert torch.equal(x, x.round()) and float(x.min()) >= 0 and float(x.max()) <= 255
    return x.cpu().permute(0, 2, 3, 1).to(torch.uint8)


def each_by_pil(images: torch.Tensor, operation: PilOperation, values: torch.Tensor) -> torch.Tensor:
    pairs = zip(images, values.tolist(), strict=True)
    return torch.from_numpy(np.stack([np.array(operation(Image.fromarray(i.numpy()), v)) for i, v in pairs]))


def affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Callable[[Image.Image], Image.Image]:
    return lambda im: im.transform(im.size, Image.Transform.AFFINE, (a, b, c, d, e, f))


PIL_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "rotate": lambda im, v: im.rotate(v),
    "shear_x": lambda im, v: affine(1, v, 0, 0, 1, 0)(im),
    "shear_y": lambda im, v: affine(1, 0, 0, v, 1, 0)(im),
    "translate_x": lambda im, v: affine(1, 0, v * im.size[0], 0, 1, 0)(im),
    "translate_y": lambda im, v: affine(1, 0, 0, 0, 1, v * im.size[1])(im),
}


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


def view_by_pil(pixels: torch.Tensor, view: View, p: dict[str, torch.Tensor], i: int) -> torch.Tensor:
    """Render one image as the reference's transforms do; the crop is taken horizontally first."""
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
