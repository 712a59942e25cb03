"""Views of whole images (``data.crop=whole``) against torchvision's transforms of PIL images."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms import functional as tv

from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource
from scan_fast.data.sources import SubsetSource
from scan_fast.random import stream_key
from scan_fast.views.maker import ViewMaker
from scan_fast.views.parameters import AffineView, PlainView, SimCLRView, StrongView, View
from scan_fast.views.render_torch import TorchRenderer

KEY = stream_key(0, "clustering")
# Width and height: landscape, portrait, odd, smaller than the resized image, long, tall, square, already resized.
SIZES = [(500, 375), (375, 500), (501, 333), (150, 113), (900, 300), (281, 399), (320, 320), (341, 256), (257, 259)]


def photographs(folder: Path) -> FileSource:
    """One JPEG of each size, each with another EXIF orientation."""
    names = []
    for number, (width, height) in enumerate(SIZES):
        exif = Image.Exif()
        exif[0x0112] = 1 + number % 8
        pixels = varied(7, height, width, seed=number)[0 if number % 2 else 6]
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.jpg", quality=90, exif=exif)
        names.append(f"{number}.jpg")
    return FileSource(ImagePaths(names, folder), None, 256, workers=2, resident=False)


def opened(folder: Path, number: int) -> Image.Image:
    with Image.open(folder / f"{number}.jpg") as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def pixels_of(source: FileSource | SubsetSource, view: View, rows: torch.Tensor) -> torch.Tensor:
    """Return (n, side, side, 3) pixel values of a view, undoing the normalisation."""
    maker = ViewMaker(source, TorchRenderer((0.0,) * 3, (1 / 255,) * 3, "cpu"), 0, "evaluation", "whole")
    found = maker.render([(view, 0)], rows, epoch=0)[0].permute(0, 2, 3, 1)
    assert float((found - found.round()).abs().max()) < 1e-3
    return found.round().int()


@pytest.mark.parametrize("side", [224, 223])
def test_the_plain_view_is_torchvisions_resize_and_centre_crop(side: int, tmp_path: Path) -> None:
    source = photographs(tmp_path)
    transform = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(side)])
    found = pixels_of(source, PlainView(size=side), torch.arange(len(source)))
    for number, got in enumerate(found):
        assert np.array_equal(got.numpy(), np.array(transform(opened(tmp_path, number)))), SIZES[number]
    some = torch.tensor([5, 2])
    assert torch.equal(pixels_of(SubsetSource(source, some), PlainView(size=side), torch.arange(2)), found[some])


def test_one_box_shows_the_pixels_of_torchvision(tmp_path: Path) -> None:
    source = photographs(tmp_path)
    n = 12
    for number in range(len(source)):
        resized = tv.resize(opened(tmp_path, number), 256)
        rows = torch.full((n,), number)
        heights, widths = source.files.whole_sizes(rows, 256)
        assert (int(widths[0]), int(heights[0])) == resized.size
        p = SimCLRView(size=224).sample(KEY, 0, torch.arange(n), 0, heights, widths)
        boxes = torch.stack([p[name] for name in ("top", "left", "height", "width")], dim=1)
        (found,) = source.files.cut_whole(rows, 256, [boxes], [224])
        for box, got in zip(boxes.tolist(), found, strict=True):
            expected = np.array(tv.resized_crop(resized, *box, [224, 224]))
            # PIL resizes the height of some boxes first, which rounds differently.
            assert np.abs(got.numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize(("height", "width"), [(256, 341), (384, 256), (256, 768), (256, 256)])
def test_crops_show_as_much_of_the_image_as_torchvisions(height: int, width: int) -> None:
    n = 4000
    p = SimCLRView(size=224).sample(KEY, 0, torch.arange(n), 0, torch.full((n,), height), torch.full((n,), width))
    ours = (p["height"] * p["width"]).double() / (height * width)
    torch.manual_seed(0)
    drawn = transforms.RandomResizedCrop.get_params
    image, sides = torch.empty(3, height, width), []
    for _ in range(n):
        _, _, crop_height, crop_width = drawn(image, [0.2, 1.0], [3 / 4, 4 / 3])
        sides.append(crop_height * crop_width / (height * width))
    theirs = torch.tensor(sides).double()
    error = math.sqrt(float(ours.var() + theirs.var()) / n)
    assert abs(float(ours.mean() - theirs.mean())) < 4 * error
    # The centre square alone would show less than that.
    if height != width:
        square = SimCLRView(size=224).sample(KEY, 0, torch.arange(n), 0, 256, 256)
        share = (square["height"] * square["width"]).double() / (height * width)
        assert float(theirs.mean() - share.mean()) > 20 * error


def test_random_crops_fall_everywhere_in_an_oblong_image() -> None:
    n = 20_000
    p = StrongView(size=224).sample(KEY, 0, torch.arange(n), 0, torch.full((n,), 256), torch.full((n,), 341))
    assert bool((p["height"] == 224).all() and (p["width"] == 224).all())
    for name, places in (("top", 33), ("left", 118)):
        counts = p[name].bincount()
        assert len(counts) == places and int(counts.min()) > 0.5 * n / places


@pytest.mark.parametrize("view", [SimCLRView(size=32), StrongView(size=32), AffineView(size=32), PlainView(size=24)])
def test_images_of_different_sizes_get_the_parameters_of_each_alone(view: View) -> None:
    samples, heights, widths = (
        torch.tensor([3, 99, 7, 3]),
        torch.tensor([40, 33, 90, 32]),
        torch.tensor([32, 45, 33, 50]),
    )
    together = view.sample(KEY, 4, samples, 1, heights, widths)
    for row, (sample, height, width) in enumerate(zip(samples, heights.tolist(), widths.tolist(), strict=True)):
        alone = view.sample(KEY, 4, sample.view(1), 1, height, width)
        assert together.keys() == alone.keys()
        for name, value in together.items():
            assert torch.equal(value[row : row + 1], alone[name]), name


def test_a_png_that_tells_its_orientation_late_is_not_stretched(tmp_path: Path) -> None:
    """Its size was noted as stored, and decoding turns it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = varied(1, 60, 90)[0].numpy()
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    content = (tmp_path / "x.png").read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4], "big")
    close = content.index(b"IEND") - 4
    (tmp_path / "x.png").write_bytes(content[:start] + content[end:close] + content[start:end] + content[close:])
    source = FileSource(ImagePaths(["x.png"], tmp_path), None, 30, resident=False)
    heights, widths = source.files.whole_sizes(torch.tensor([0]), 30)
    assert (int(heights), int(widths)) == (30, 45)
    (found,) = source.files.cut_whole(torch.tensor([0]), 30, [torch.tensor([[0, 0, 30, 30]])], [30])
    with Image.open(tmp_path / "x.png") as image:
        turned = ImageOps.exif_transpose(image).transpose(Image.Transpose.TRANSPOSE)
    expected = turned.resize((45, 30), Image.Resampling.BILINEAR).crop((0, 0, 30, 30))
    assert np.array_equal(found[0].numpy(), np.array(expected))
