"""Images to look at, read from their files again at any size."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image, ImageFile, ImageOps

from scan_fast.data import FileSource, ImagePaths, SubsetSource, TensorSource
from scan_fast.data.decode import decode_small
from scan_fast.errors import DataError


def smooth(height: int, width: int) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    levels = (y * 255 // (height - 1), x * 255 // (width - 1), (x + y) * 255 // (height + width - 2))
    return Image.fromarray(np.stack(levels, axis=2).astype(np.uint8))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_original_is_whole_upright_and_at_most_as_long(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / f"x.{suffix}"
    smooth(300, 200).save(file, exif=exif, quality=95)
    with Image.open(file) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    expected.thumbnail((60, 60))
    source = FileSource(ImagePaths([file]), None, 16, resident=True)
    got = source.original(0, 60)
    assert got.mode == "RGB" and got.size == expected.size and max(got.size) == 60
    assert np.abs(np.array(got).astype(int) - np.array(expected)).max() <= 8


def test_a_small_original_keeps_its_size_and_pixels(tmp_path: Path) -> None:
    array = varied(1, 9, 14)[0].numpy()
    Image.fromarray(array).save(tmp_path / "x.png")
    got = FileSource(ImagePaths(["x.png"], tmp_path), None, 4).original(0, 200)
    assert np.array_equal(np.array(got), array)


def test_originals_of_bytes_and_of_sixteen_bits() -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 80), 200 * 257, dtype=np.uint16)).save(buffer, "PNG")
    got = decode_small(buffer.getvalue(), 20)
    assert got.size == (20, 10) and np.unique(np.array(got)).tolist() == [200]


def test_a_long_line_keeps_one_pixel() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 1), (9, 8, 7)).save(buffer, "PNG")
    assert decode_small(buffer.getvalue(), 32).size == (32, 1)


def test_a_large_photograph_is_decoded_at_a_reduced_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smooth(1600, 1200).save(tmp_path / "x.jpg", quality=90)
    drafts = []
    load = ImageFile.ImageFile.load

    def noted(image: ImageFile.ImageFile) -> object:
        drafts.append(image.size)
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noted)
    assert FileSource(ImagePaths(["x.jpg"], tmp_path), None, 8, resident=False).original(0, 100).size == (75, 100)
    assert min(drafts) == (150, 200)


def test_arrays_show_their_own_pixels() -> None:
    images = varied(3, 20, 20)
    source = TensorSource(images)
    assert np.array_equal(np.array(source.original(2, 64)), images[2].numpy())
    assert source.original(1, 10).size == (10, 10)
    grey = TensorSource(images[..., :1])
    assert np.array_equal(np.array(grey.original(0, 64)), images[0, ..., :1].expand(-1, -1, 3).numpy())


def test_a_subset_counts_its_own_rows(tmp_path: Path) -> None:
    images = varied(4, 10, 10).numpy()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    source = FileSource(ImagePaths([f"{i}.png" for i in range(4)], tmp_path), None, 10)
    subset = SubsetSource(SubsetSource(source, torch.tensor([3, 1])), torch.tensor([1]))
    assert np.array_equal(np.array(subset.original(0, 64)), images[1])


def test_an_original_that_is_gone_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    source = FileSource(ImagePaths(["x.png"], tmp_path), None, 8)
    (tmp_path / "x.png").unlink()
    with pytest.raises(DataError, match=r"cannot read image .*x\.png: FileNotFoundError"):
        source.original(0, 64)
