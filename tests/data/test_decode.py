"""Decoding of every image format that PIL reads, compared with PIL or with the pixels that were written."""

from __future__ import annotations

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image, ImageOps

from scan_fast.data import decode as decoding
from scan_fast.data.decode import cut, decode, read_header, square


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> Path:
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def square_of(path: Path, size: int, smallest: int | None = None) -> np.ndarray:
    return square(decode(path, smallest=smallest)[1], size).numpy()


GREY = np.linspace(0, 255, 16 * 16).astype(np.uint8).reshape(16, 16)


@pytest.mark.parametrize("suffix", ["png", "bmp", "gif", "webp", "tif", "tiff", "pgm", "PNG"])
def test_grey_levels_survive_every_lossless_format(tmp_path: Path, suffix: str) -> None:
    options: dict[str, Any] = {"lossless": True} if suffix == "webp" else {}
    file = save(tmp_path / f"x.{suffix}", GREY, **options)
    assert np.array_equal(square_of(file, 16), np.repeat(GREY[..., None], 3, axis=2))


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    for suffix in ("png", "tif"):
        file = save(tmp_path / f"x.{suffix}", GREY.astype(np.uint16) * 257)
        assert np.array_equal(square_of(file, 16)[..., 1], GREY)
    floats = save(tmp_path / "f.tif", (GREY / 255).astype(np.float32))
    assert np.array_equal(square_of(floats, 16)[..., 0], GREY)


def test_transparency_lies_on_black(tmp_path: Path) -> None:
    rgba = np.full((8, 8, 4), 200, dtype=np.uint8)
    rgba[:, :4, 3] = 0
    rgba[:, 4:, 3] = 255
    expected = np.full((8, 8, 3), 200, dtype=np.uint8)
    expected[:, :4] = 0
    assert np.array_equal(square_of(save(tmp_path / "a.png", rgba), 8), expected)
    assert np.array_equal(square_of(save(tmp_path / "la.png", rgba, "LA"), 8), expected)
    palette = Image.fromarray(rgba).convert("RGB").quantize(4)
    palette.putpixel((0, 0), 1)
    palette.info["transparency"] = int(np.array(palette)[4, 4])
    palette.save(tmp_path / "p.png", transparency=palette.info["transparency"])
    assert square_of(tmp_path / "p.png", 8)[4, 4].tolist() == [0, 0, 0]


def test_palette_one_bit_and_cmyk_are_converted(tmp_path: Path) -> None:
    colours = np.zeros((8, 8, 3), dtype=np.uint8)
    colours[:4, :, 0] = 250
    colours[4:, :, 2] = 130
    for name, image in (
        ("p.png", Image.fromarray(colours).quantize(8)),
        ("p.gif", Image.fromarray(colours).quantize(8)),
        ("c.tif", Image.fromarray(colours).convert("CMYK")),
    ):
        image.save(tmp_path / name)
        assert np.abs(square_of(tmp_path / name, 8).astype(int) - colours).max() <= 2, name
    Image.fromarray(colours[..., 0] > 100).save(tmp_path / "one.png")
    assert np.array_equal(square_of(tmp_path / "one.png", 8)[..., 2], np.where(colours[..., 0] > 100, 255, 0))


def test_the_first_frame_of_an_animation_is_taken(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), level, dtype=np.uint8)) for level in (40, 160, 240)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert square_of(tmp_path / "x.gif", 8).mean() == 40


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    """The upright image has its bright quarter at the top left."""
    upright = np.zeros((16, 16), dtype=np.uint8)
    upright[:8, :8] = 255
    upright[:8, 8:] = 120
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
    image = Image.fromarray(upright)
    stored = image if undo is None else image.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "x.jpg", exif=exif, quality=95)
    got = square_of(tmp_path / "x.jpg", 16)[..., 0].astype(int)
    assert np.abs(got - upright).max() < 30


def test_oblong_files_are_cut_to_the_centre_and_resized(tmp_path: Path) -> None:
    y, x = np.mgrid[0:300, 0:200]
    smooth = np.stack((y * 255 // 299, x * 255 // 199, (x + y) * 255 // 498), axis=2).astype(np.uint8)
    expected = np.array(Image.fromarray(smooth[50:250]).resize((32, 32), Image.Resampling.BILINEAR)).astype(int)
    # The order of PIL's two passes depends on the shape it is given, and moves a pixel by one level at most.
    assert np.abs(square_of(save(tmp_path / "a.png", smooth), 32) - expected).max() <= 1
    # A JPEG is decoded at a reduced scale first, which moves smooth colours by little.
    assert np.abs(square_of(save(tmp_path / "a.jpg", smooth, quality=95), 32) - expected).max() <= 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "grey.jpg", "progressive.jpg", "444.jpg", "x.png", "x.webp", "x.tif"])
def test_whole_files_have_the_levels_of_pil(tmp_path: Path, name: str, orientation: int) -> None:
    """With either decoder, upright, and with the header known or not."""
    array = varied(2, 51, 38)[orientation % 2].numpy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    special: dict[str, dict[str, Any]] = {"progressive.jpg": {"progressive": True}, "444.jpg": {"subsampling": 0}}
    options = special.get(name, {})
    file = save(tmp_path / name, array, "L" if name == "grey.jpg" else None, exif=exif, **options)
    with Image.open(file) as image:
        expected = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    for known in (None, read_header(file)):
        header, got = decode(file, known)
        assert np.array_equal(got.numpy(), expected) and got.is_contiguous()
        # PIL turns a TIFF by itself.
        assert header == (*expected.shape[:2], 1 if name == "x.tif" else orientation, name.endswith("jpg"))
        assert known in (None, header)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_uncompressed_grey_tiff_is_upright(tmp_path: Path, orientation: int) -> None:
    """PIL maps such a file into memory if it knows its name, and mixes up the rows of one with an orientation."""
    array = varied(1, 23, 38)[0].numpy()
    exif = Image.Exif()
    exif[0x0112] = orientation
    file, other = (save(tmp_path / name, array, "L", exif=exif) for name in ("grey.tif", "grey.png"))
    expected = decode(other)[1]
    for encoded in (file, file.read_bytes()):
        header, got = decode(encoded)
        assert got.equal(expected)
        assert header[:2] == read_header(encoded)[:2] == expected.shape[:2]


def test_boxes_are_cut_and_resized_as_pil_does(tmp_path: Path) -> None:
    for height, width, size in ((40, 30, 16), (40, 30, 64), (300, 7, 32), (1, 1, 8)):
        image = varied(1, height, width)[0]
        rng = np.random.default_rng(size)
        top, left = rng.integers(0, height, 5), rng.integers(0, width, 5)
        boxes = np.stack((top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1)), axis=1)
        boxes[3:, 2:] = boxes[3:, 2:].min(axis=1, keepdims=True)
        got = cut(image, torch.from_numpy(boxes), size)
        for (y, x, h, w), part in zip(boxes.tolist(), got, strict=True):
            whole = Image.fromarray(image.numpy())
            expected = whole.crop((x, y, x + w, y + h)).resize((size, size), Image.Resampling.BILINEAR)
            # PIL rounds differently if it resizes the height first.
            assert np.abs(part.numpy().astype(int) - np.array(expected)).max() <= (h != w)


def test_images_too_long_for_the_kernel_are_cut_all_the_same() -> None:
    long = varied(1, 3, decoding.MAX_SIDE + 30)[0]
    boxes = torch.tensor([[0, 16000, 3, 300], [1, 16300, 2, 100]])
    part = cut(long[:, 16000:].contiguous(), boxes - torch.tensor([0, 16000, 0, 0]), 24)
    assert torch.equal(cut(long, boxes, 24), part)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (90, 1)])
def test_images_of_one_pixel_and_lines(tmp_path: Path, height: int, width: int) -> None:
    array = np.zeros((height, width, 3), dtype=np.uint8)
    array[height // 2 - (height % 2 == 0), width // 2 - (width % 2 == 0)] = (10, 120, 230)
    array[height // 2, width // 2] = (10, 120, 230)
    for name in ("x.png", "x.bmp", "x.gif", "x.jpg"):
        centre = square_of(save(tmp_path / name, array, quality=100, subsampling=0), 5)
        assert centre.shape == (5, 5, 3) and len(np.unique(centre.reshape(-1, 3), axis=0)) == 1
        if not (name == "x.jpg" and height * width > 1):  # a line's neighbours bleed into a JPEG's pixel
            assert np.abs(centre[0, 0].astype(int) - (10, 120, 230)).max() <= (2 if name == "x.jpg" else 0), name


def png(path: Path, rows: np.ndarray, colour_type: int) -> Path:
    """Write (H, W, channels) uint16 as a PNG of 16 bits, which PIL cannot."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = rows.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    )
    return path


def tiff(path: Path, rows: np.ndarray, order: str) -> Path:
    """Write (H, W, 3) or (H, W, 1) uint16 as an uncompressed TIFF, little-endian (<) or big-endian (>)."""
    height, width, channels = rows.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, 16), (259, 3, 1), (262, 3, 2 if channels == 3 else 1)]
    tags += [(273, 4, 8), (277, 3, channels), (278, 4, height), (279, 4, rows.size * 2)]
    data = rows.astype(order + "u2").tobytes()
    offset = 8 + len(data)
    extra = offset + 2 + 12 * len(tags) + 4
    out = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, offset) + data
    out += struct.pack(order + "H", len(tags))
    for tag, kind, value in tags:
        if tag == 258 and channels == 3:
            out += struct.pack(order + "HHII", tag, 3, 3, extra)
        else:
            out += struct.pack(order + ("HHIHxx" if kind == 3 else "HHII"), tag, kind, 1, value)
    path.write_bytes(out + struct.pack(order + "IHHH", 0, 16, 16, 16))
    return path


def test_colours_of_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    levels = varied(1, 16, 16)[0].numpy()
    wide = levels.astype(np.uint16) * 257
    assert np.array_equal(square_of(png(tmp_path / "rgb.png", wide, 2), 16), levels)
    opaque = np.concatenate((wide, np.full_like(wide[..., :1], 65535)), axis=2)
    assert np.array_equal(square_of(png(tmp_path / "rgba.png", opaque, 6), 16), levels)
    grey = np.repeat(levels[..., :1], 3, axis=2)
    assert np.array_equal(square_of(png(tmp_path / "la.png", opaque[..., [0, 3]], 4), 16), grey)
    for order in "<>":
        assert np.array_equal(square_of(tiff(tmp_path / "rgb.tif", wide, order), 16), levels)
        assert np.array_equal(square_of(tiff(tmp_path / "grey.tif", wide[..., :1], order), 16), grey)


def test_cmyk_photographs_are_not_inverted(tmp_path: Path) -> None:
    """Adobe's programs and PIL store CMYK in JPEG files inverted, with a marker."""
    patches = np.zeros((32, 32, 3), dtype=np.uint8)
    patches[:16, :16], patches[:16, 16:], patches[16:, :16] = (240, 20, 20), (30, 200, 60), (250, 250, 250)
    file = save(tmp_path / "x.jpg", patches, "CMYK", quality=98, subsampling=0)
    assert b"Adobe" in file.read_bytes()[:64] and not read_header(file).jpeg
    for smallest in (None, 16):
        header, pixels = decode(file, smallest=smallest)
        assert header == read_header(file) and len(pixels) == (smallest or 32)
    assert np.abs(square_of(file, 32).astype(int) - patches).max() <= 8


def test_a_palette_with_degrees_of_transparency_lies_on_black(tmp_path: Path) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([200, 100, 50] * 4)
    image.putdata([i // 16 for i in range(64)])
    image.save(tmp_path / "p.png", transparency=bytes([0, 85, 170, 255]))
    rows = square_of(tmp_path / "p.png", 8)[::2, 0].astype(int)
    expected = np.outer(np.array([0, 85, 170, 255]) / 255, [200, 100, 50])
    assert np.abs(rows - expected).max() <= 1


@pytest.mark.parametrize("name", ["x.webp", "x.png", "x.apng", "x.tif"])
def test_the_first_of_several_frames_or_pages(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (8, 8), (level, level, level)) for level in (40, 160, 240)]
    options: dict[str, Any] = {"lossless": True} if name == "x.webp" else {}
    kind = "PNG" if name == "x.apng" else None
    frames[0].save(tmp_path / name, kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(tmp_path / name) as image:
        assert getattr(image, "n_frames", 1) == 3
    assert np.all(square_of(tmp_path / name, 8) == 40)


def test_a_file_that_unpacks_to_too_many_pixels_is_refused(tmp_path: Path) -> None:
    """A small file whose header promises more than 178,956,970 pixels: refused before memory is allocated for them."""
    file = png(tmp_path / "bomb.png", np.zeros((1, 1, 1), dtype=np.uint16), 0)
    data = bytearray(file.read_bytes())
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    file.write_bytes(data)
    for read in (decode, read_header):
        with pytest.raises(Image.DecompressionBombError, match="exceeds limit"):
            read(file)


def test_large_files_wait_for_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as files: all end, with the same pixels as alone, with either decoder."""
    monkeypatch.setattr(decoding, "_LARGE", 100)
    arrays = varied(8, 40, 40).numpy()
    files = [save(tmp_path / f"{i}.{'png' if i % 2 else 'jpg'}", array) for i, array in enumerate(arrays)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda file: square_of(file, 20), files))
    monkeypatch.undo()
    assert all(np.array_equal(got, square_of(file, 20)) for got, file in zip(together, files, strict=True))


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=["baseline", "progressive"])
def test_cut_off_photographs_are_found_out(tmp_path: Path, options: dict[str, object]) -> None:
    """libjpeg invents the missing part; a truncated file is an error with either decoder."""
    buffer = io.BytesIO()
    Image.fromarray(varied(1, 200, 200)[0].numpy()).save(buffer, "JPEG", **options)
    content = buffer.getvalue()
    file = tmp_path / "x.jpg"
    file.write_bytes(content)
    header = read_header(file)
    for length in (len(content) - 2000, len(content) // 2, 700, 100, 3, 0):
        file.write_bytes(content[:length])
        for known in (None, header):
            with pytest.raises((OSError, SyntaxError)):
                decode(file, known)
    # Bytes behind the end, as some cameras and web servers leave them, do no harm.
    file.write_bytes(content + b"\0" * 10)
    trailing = decode(file, header)[1]
    file.write_bytes(content)
    assert torch.equal(trailing, decode(file, header)[1])


def test_the_orientation_of_a_png_counts_wherever_it_stands(tmp_path: Path) -> None:
    """Some programs write it after the pixels, and only decoding finds it there."""
    exif = Image.Exif()
    exif[0x0112] = 6
    array = varied(1, 20, 30)[0].numpy()
    content = save(tmp_path / "x.png", array, exif=exif).read_bytes()
    start = content.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", content[start : start + 4])[0]
    late = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    (tmp_path / "late.png").write_bytes(late)
    for name in ("x.png", "late.png"):
        header, pixels = decode(tmp_path / name)
        assert header == (30, 20, 6, False)
        assert np.array_equal(pixels.numpy(), np.rot90(array, -1))


def test_reduced_decoding_stays_above_the_smallest_side(tmp_path: Path) -> None:
    smooth = Image.fromarray(varied(1, 6, 8)[0].numpy()).resize((800, 600), Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "x.jpg", quality=95)
    for smallest, height in ((600, 600), (301, 600), (300, 300), (80, 150), (10, 75)):
        header, pixels = decode(tmp_path / "x.jpg", smallest=smallest)
        assert header == (600, 800, 1, True) and pixels.shape == (height, height * 4 // 3, 3)
    scaled, exact = (square_of(tmp_path / "x.jpg", 75, smallest=s).astype(int) for s in (150, None))
    assert np.abs(scaled - exact).max() <= 6 and np.abs(scaled - exact).mean() < 1
