"""Image files of an attacker: no other program is started, and none takes more memory than a large picture."""

from __future__ import annotations

import io
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from scan_fast.data import decode as decoding
from scan_fast.data.decode import Header, decode, decode_small, open_image, read_header, to_rgb
from scan_fast.data.formats import FORMATS, missing_formats, plugins

SIDE = 60_000  # 3.6e9 pixels
READERS: list[Callable[[Any], Any]] = [read_header, decode, lambda data: decode_small(data, 8)]


def encoded(kind: str, size: tuple[int, int] = (8, 8), **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (200, 10, 10)).save(file, kind, **options)
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    head = struct.pack(">IIBBBBB", SIDE, SIDE, 1, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(bytes(1 << 20)))
        + chunk(b"IEND", b"")
    )


def huge_jpeg() -> bytes:
    data = encoded("JPEG")
    return data.replace(struct.pack(">BHH", 8, 8, 8), struct.pack(">BHH", 8, SIDE, SIDE))


def huge_tiff(tile: int = 0) -> bytes:
    """Return a TIFF of huge size, or of 8 x 8 pixels in one huge tile."""
    side = 8 if tile else SIDE
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, 5), (262, 3, 1), (277, 3, 1)]
    place = [(322, 4, tile), (323, 4, tile), (324, 4, 8), (325, 4, 8)]
    tags += place if tile else [(273, 4, 8), (278, 4, side), (279, 4, 8)]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\x00" + struct.pack("<I", 16) + bytes(8) + struct.pack("<H", len(tags)) + entries + bytes(4)


HUGE = {
    "PNG": huge_png(),
    "JPEG": huge_jpeg(),
    "GIF": b"GIF89a" + struct.pack("<HH", SIDE, SIDE) + encoded("GIF")[10:],
    "BMP": encoded("BMP").replace(struct.pack("<ii", 8, 8), struct.pack("<ii", SIDE, SIDE)),
    "PPM": b"P6\n%d %d\n255\n" % (SIDE, SIDE) + bytes(100),
    "bitmap": b"P4\n%d %d\n" % (SIDE, SIDE) + bytes(100),
    "TIFF": huge_tiff(),
    "tile": huge_tiff(1 << 20),
    "JPEG2000": encoded("JPEG2000").replace(struct.pack(">II", 8, 8), struct.pack(">II", SIDE, SIDE)),
}


@pytest.mark.parametrize("unlimited", [False, True])
@pytest.mark.parametrize("kind", HUGE)
def test_huge_images_are_refused_by_their_header(kind: str, unlimited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where another library has told PIL to refuse none."""
    if unlimited:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)

    def refuse(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image, "_getdecoder", refuse)
    for read in READERS:
        with pytest.raises(Image.DecompressionBombError, match="pixels"):
            read(HUGE[kind])


@pytest.mark.parametrize("kind", ["WEBP", "AVIF"])
def test_the_limit_is_one_of_pixels_for_every_format(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "AVIF" and "AVIF" in missing_formats():
        pytest.skip("this PIL has no AVIF")
    monkeypatch.setattr(decoding, "MOST_PIXELS", 63)
    for read in READERS:
        with pytest.raises(Image.DecompressionBombError, match="it has 8 x 8 pixels, more than 63 in all"):
            read(encoded(kind))


def test_a_noted_header_does_not_open_the_way_for_a_huge_jpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a decode cache that came with the images."""

    def refuse(*_: Any) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(decoding, "_jpeg_operator", lambda: refuse)
    with pytest.raises(Image.DecompressionBombError):
        decode(huge_jpeg(), Header(8, 8, 1, True))


def test_the_size_of_a_jpeg_is_found_behind_other_segments() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded("JPEG", (24, 16), exif=exif, comment=b"x" * 1000)
    for data in (plain, encoded("JPEG", (24, 16), progressive=True), plain[:2] + b"\xff" * 3 + plain[2:]):
        assert decoding._jpeg_pixels(np.frombuffer(data, np.uint8)) == 24 * 16
    assert decoding._jpeg_pixels(np.frombuffer(plain[:40], np.uint8)) == 0
    assert decoding._jpeg_pixels(np.frombuffer(b"\xff\xd8" + bytes(100), np.uint8)) == 0


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n"


def others() -> dict[str, bytes]:
    """Return images of formats that no suffix of ours promises."""
    found = {"EPS": EPS}
    for kind in ("ICO", "PCX", "SGI", "TGA", "DDS", "ICNS", "QOI"):
        try:
            found[kind] = encoded(kind, (16, 16))
        except (KeyError, OSError):
            continue
    return found


def test_only_the_promised_formats_are_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    Image.init()  # as another library may have done
    for kind, data in others().items():
        (tmp_path / "x.png").write_bytes(data)
        for read in READERS:
            for given in (data, str(tmp_path / "x.png")):
                with pytest.raises(UnidentifiedImageError):
                    read(given)
        assert kind not in plugins()
    names = {"JPEG 2000": "JPEG2000", "WebP": "WEBP", "PNM": "PPM", "HEIC": "HEIF"}
    readable = {names.get(known.name, known.name) for known in FORMATS if known.name not in missing_formats()}
    assert set(plugins()) - {"HEIF"} >= readable - {"HEIF"}


def test_a_misnamed_file_is_read_by_what_it_is(tmp_path: Path) -> None:
    for kind in ("PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"):
        (tmp_path / "x.jpg").write_bytes(encoded(kind))
        header, pixels = decode(str(tmp_path / "x.jpg"))
        assert (header.height, header.width, header.jpeg) == (8, 8, False)
        assert abs(int(pixels[0, 0, 0]) - 200) < 20


def test_texts_and_profiles_of_a_png_that_inflate_are_bounded() -> None:
    bomb = zlib.compress(bytes(1 << 27), 9)
    data = encoded("PNG")
    for extra in (
        chunk(b"zTXt", b"a\0\0" + bomb),
        chunk(b"iTXt", b"a\0\1\0\0\0" + bomb),
        chunk(b"iCCP", b"a\0\0" + bomb),
    ):
        bad = data[:33] + extra + data[33:]
        assert len(bad) < 200_000
        for read in READERS:
            with pytest.raises((ValueError, OSError, SyntaxError)):
                read(bad) if b"iCCP" not in extra else _without_profile(read, bad)
    assert PngImagePlugin.MAX_TEXT_CHUNK <= 1 << 20


def _without_profile(read: Callable[[Any], Any], data: bytes) -> None:
    read(data)
    raise ValueError("PIL left the profile out")


def test_files_of_more_bytes_than_an_image_can_have_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sparse.jpg"
    path.write_bytes(encoded("JPEG"))
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    for read in (*READERS, lambda data: decode(data, Header(8, 8, 1, True))):
        with pytest.raises(ValueError, match="it has 1,099,511,627,776 bytes, and an image at most 2,147,483,648"):
            read(str(path))


def test_sixteen_bits_are_scaled_as_before() -> None:
    values = np.array([[0, 127, 128, 129, 256, 257, 65535, 65534, 32768]], dtype=np.uint16)
    expected = np.clip((values.astype(np.int64) + 128) // 257, 0, 255)
    assert np.array_equal(np.asarray(to_rgb(Image.fromarray(values)))[..., 0], expected)
    wide = np.array([[-5, 70_000, 300]], dtype=np.int32)
    assert np.asarray(to_rgb(Image.fromarray(wide)))[..., 0].tolist() == [[0, 255, 1]]


def test_frames_after_the_first_are_not_decoded() -> None:
    first = Image.new("RGB", (8, 8), (200, 10, 10))
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        file = io.BytesIO()
        first.save(file, kind, save_all=True, append_images=[Image.new("RGB", (8, 8), (0, n, 0)) for n in range(50)])
        with open_image(file.getvalue()) as image:
            assert image.size == (8, 8)
        assert abs(int(decode(file.getvalue())[1][0, 0, 0]) - 200) < 10
