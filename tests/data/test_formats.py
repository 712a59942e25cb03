"""Photographs of phones and cameras: HEIC, AVIF, WebP, TIFF and 16 bits, upright on every way that images are read."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, features

from scan_fast.data import DataConfig, FileSource, ImagePaths, open_splits, source_from
from scan_fast.data.decode import decode, decode_small, read_header
from scan_fast.data.decode_cache import DecodeCache
from scan_fast.data.formats import FORMATS, IMAGE_SUFFIXES, missing_formats, prepare, register_heic

HEIC = pytest.mark.skipif(not register_heic(), reason="pillow-heif is not installed")
AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
SUFFIXES = [
    pytest.param("heic", marks=HEIC),
    pytest.param("heif", marks=HEIC),
    pytest.param("hif", marks=HEIC),
    pytest.param("avif", marks=AVIF),
    "webp",
    "tif",
    "png",
    "jpg",
]
FORMAT_NAMES = {"hif": "HEIF", "heic": "HEIF", "heif": "HEIF", "tif": "TIFF", "jpg": "JPEG"}


def quarters(height: int = 60, width: int = 80) -> Image.Image:
    """Four colours, one a quarter, so that every orientation looks different."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    image[: height // 2, : width // 2] = (230, 40, 40)
    image[: height // 2, width // 2 :] = (40, 220, 40)
    image[height // 2 :, : width // 2] = (40, 40, 230)
    image[height // 2 :, width // 2 :] = (200, 200, 60)
    return Image.fromarray(image)


def write(path: Path, image: Image.Image, orientation: int = 1) -> np.ndarray:
    """Write an image that is stored turned, and return its upright pixels."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    suffix = path.suffix[1:]
    image.save(path, FORMAT_NAMES.get(suffix, suffix.upper()), exif=exif.tobytes(), quality=95)
    turned = image.copy()
    turned.getexif()[0x0112] = orientation
    return np.array(ImageOps.exif_transpose(turned))


def near(got: object, expected: np.ndarray) -> bool:
    pixels = np.asarray(got).astype(int)
    return pixels.shape == expected.shape and float(np.abs(pixels - expected).mean()) < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_way_to_read_is_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    file = tmp_path / f"x.{suffix}"
    upright = write(file, quarters(), orientation)
    header, pixels = decode(file)
    assert near(pixels, upright)
    assert (header.height, header.width) == upright.shape[:2]
    checked = read_header(file)
    assert (checked.height, checked.width) == upright.shape[:2] and checked.jpeg == (suffix == "jpg")
    assert near(decode(file, checked)[1], upright)
    assert near(decode(file.read_bytes())[1], upright)
    assert near(decode_small(file, 200), upright)
    small = decode_small(file, 20)
    expected = Image.fromarray(upright)
    expected.thumbnail((20, 20))
    assert near(small, np.array(expected))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_sources_in_memory_in_files_and_from_the_decode_cache(tmp_path: Path, suffix: str) -> None:
    names = []
    for number in range(3):
        names.append(f"{number}.{suffix}")
        write(tmp_path / names[-1], quarters(60 + number, 80), 6)
    images = ImagePaths(names, tmp_path)
    resident = FileSource(images, None, 16)
    expected = resident.read(torch.arange(3))
    first = DecodeCache()
    FileSource(images, None, 16, resident=False, on_error="skip", decode_cache=first)
    streamed = FileSource(images, None, 16, resident=False, on_error="skip", decode_cache=DecodeCache(first.to_bytes()))
    for source in (streamed, FileSource(images, None, 16, resident=False)):
        assert torch.equal(source.read(torch.arange(3)), expected)
    # Upright, the red quarter of an image turned by orientation 6 is at the top right.
    assert (expected[0, 3, 12].int() - torch.tensor([230, 40, 40])).abs().max() < 40
    assert resident.files.jpeg.tolist() == [suffix == "jpg"] * 3, "what is no JPEG is not left to other decoders"


@HEIC
def test_sixteen_bits_of_heic_are_scaled(tmp_path: Path) -> None:
    import pillow_heif

    deep = np.array(quarters()).astype(np.uint16) * 257
    pillow_heif.from_bytes("RGB;16", (80, 60), deep.tobytes()).save(tmp_path / "x.heic", quality=95)
    assert near(decode(tmp_path / "x.heic")[1], np.array(quarters()))


@HEIC
def test_the_suffix_does_not_matter_to_the_reading(tmp_path: Path) -> None:
    upright = write(tmp_path / "x.heic", quarters(), 8)
    (tmp_path / "x.heic").rename(tmp_path / "x.jpg")
    assert near(decode(tmp_path / "x.jpg")[1], upright)


@HEIC
def test_half_a_heic_is_named_before_training(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    for number in range(3):
        write(tmp_path / f"{number}.heic", Image.fromarray(noise))
    content = (tmp_path / "1.heic").read_bytes()
    (tmp_path / "1.heic").write_bytes(content[: len(content) // 2])
    for resident in ("host", "files"):
        splits = open_splits(
            DataConfig.model_validate({"root": tmp_path, "image_size": 8, "on_error": "skip", "resident": resident})
        )
        assert splits.train.paths == ["0.heic", "2.heic"]
        assert [name for name, _ in splits.train.skipped] == ["1.heic"]


def test_suffixes_are_known_whether_or_not_the_format_can_be_read() -> None:
    assert {".heic", ".heif", ".hif", ".avif", ".webp", ".tif", ".tiff", ".jpg"} <= IMAGE_SUFFIXES
    assert len(IMAGE_SUFFIXES) == sum(len(format.suffixes) for format in FORMATS)


def test_other_bytes_are_of_no_format_that_is_missing() -> None:
    for start in (b"", b"no image at all.", b"\0\0\0\x18ftypmp42\0\0\0\0"):
        assert prepare(start) is False


SCRIPT = """
import sys
sys.modules["pillow_heif"] = None
from PIL import features
known = features.check
features.check = lambda name: False if name == "avif" else known(name)
from scan_fast.data import DataConfig, open_splits
from scan_fast.data.formats import missing_formats
from scan_fast.errors import DataError
from scan_fast.cli import main
print(missing_formats())
for resident in ("host", "files"):
    splits = open_splits(DataConfig(root=sys.argv[1], image_size=8, on_error="skip", resident=resident))
    print(splits.train.paths, splits.train.skipped)
    try:
        open_splits(DataConfig(root=sys.argv[1], image_size=8, resident=resident))
    except DataError as error:
        print(error)
main(["info"])
"""


def test_without_the_package_the_line_names_the_extra(tmp_path: Path) -> None:
    """In a process of its own, as a registered format stays."""
    quarters().save(tmp_path / "a.png")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    done = subprocess.run([sys.executable, "-c", SCRIPT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    remedy = "HEIC images need the package pillow-heif: pip install 'scan-fast[heic]'"
    lines = done.stdout.splitlines()
    assert eval(lines[0]) == {"AVIF": "pip install --upgrade 'pillow>=11.3'", "HEIC": "pip install 'scan-fast[heic]'"}
    for skipped, refused in (lines[1:3], lines[3:5]):
        assert skipped.startswith("['a.png']") and remedy in skipped
        assert refused.startswith(f"cannot read image {tmp_path}/phone.heic: {remedy}. Remove or repair it")
    shown = done.stdout[done.stdout.index("image formats:") :]
    assert shown.splitlines()[0] == "image formats: JPEG, JPEG 2000, PNG, GIF, BMP, TIFF, WebP, PNM"
    assert "AVIF" in shown and "missing (pip install 'scan-fast[heic]')" in shown


def test_what_this_machine_reads_is_not_missing(tmp_path: Path) -> None:
    missing = missing_formats()
    for format in FORMATS:
        name = {"JPEG 2000": "JPEG2000", "HEIC": "HEIF", "PNM": "PPM"}.get(format.name, format.name)
        if format.name not in missing:
            buffer = io.BytesIO()
            quarters().save(buffer, name)
            assert decode(buffer.getvalue())[1].shape == (60, 80, 3), format.name
    assert len(source_from([_saved(tmp_path / "x.png")])) == 1


def _saved(path: Path) -> str:
    quarters().save(path)
    return str(path)
