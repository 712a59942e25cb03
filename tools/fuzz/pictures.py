"""Small valid images in every format that the package reads, made without a file."""

from __future__ import annotations

import io
import struct
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, features

from scan_fast.data.formats import register_heic

_ORIENTATION = 0x0112


def _pixels(mode: str, size: tuple[int, int] = (13, 9)) -> Image.Image:
    width, height = size
    y, x = np.mgrid[:height, :width]
    colour = np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], axis=-1).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(colour[..., 0].astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(colour[..., 0].astype(np.float32) / 255)
    image = Image.fromarray(colour)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(colour[..., 2]))
        return image
    return image.convert(mode)


def _saved(mode: str, form: str, size: tuple[int, int] = (13, 9), **options: Any) -> bytes:
    file = io.BytesIO()
    _pixels(mode, size).save(file, form, **options)
    return file.getvalue()


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif.tobytes()


def _frames(mode: str, form: str, **options: Any) -> bytes:
    more = [_pixels(mode).rotate(90 * turn) for turn in (1, 2)]
    return _saved(mode, form, save_all=True, append_images=more, **options)


def _png_with_late_exif() -> bytes:
    """Return a PNG whose orientation is stored behind its pixels."""
    plain, turned = _saved("RGB", "PNG"), _saved("RGB", "PNG", exif=_exif(6))
    start = turned.index(b"eXIf") - 4
    chunk = turned[start : start + 12 + struct.unpack_from(">I", turned, start)[0]]
    end = plain.index(b"IEND") - 4
    return plain[:end] + chunk + plain[end:]


@cache
def pictures() -> dict[str, bytes]:
    """Return images by a name with the suffix of the format; of formats that this machine cannot write, none."""
    found = {
        "baseline.jpg": _saved("RGB", "JPEG", quality=80),
        "progressive.jpg": _saved("RGB", "JPEG", progressive=True, size=(40, 24)),
        "turned.jpg": _saved("RGB", "JPEG", exif=_exif(6)),
        "mirrored.jpg": _saved("RGB", "JPEG", exif=_exif(5), subsampling=0),
        "grey.jpg": _saved("L", "JPEG"),
        "ink.jpg": _saved("CMYK", "JPEG"),
        "restart.jpeg": _saved("RGB", "JPEG", size=(40, 24), restart_marker_blocks=1),
        "several.jpg": _frames("RGB", "MPO"),
        "plain.png": _saved("RGB", "PNG"),
        "alpha.png": _saved("RGBA", "PNG"),
        "palette.png": _saved("P", "PNG", transparency=3),
        "grey16.png": _saved("I;16", "PNG"),
        "bits.png": _saved("1", "PNG"),
        "turned.png": _saved("RGB", "PNG", exif=_exif(8)),
        "late.png": _png_with_late_exif(),
        "several.apng": _frames("RGB", "PNG"),
        "plain.gif": _saved("P", "GIF"),
        "several.gif": _frames("P", "GIF", duration=100, loop=0),
        "plain.bmp": _saved("RGB", "BMP"),
        "palette.bmp": _saved("P", "BMP"),
        "plain.tif": _saved("RGB", "TIFF"),
        "grey16.tif": _saved("I;16", "TIFF"),
        "real.tif": _saved("F", "TIFF"),
        "turned.tif": _saved("RGB", "TIFF", tiffinfo={_ORIENTATION: 6}),
        "several.tif": _frames("RGB", "TIFF"),
        "plain.ppm": _saved("RGB", "PPM"),
        "grey.pgm": _saved("L", "PPM"),
        "bits.pbm": _saved("1", "PPM"),
        "text.ppm": b"P3\n2 2\n255\n255 0 0  0 255 0\n0 0 255  9 9 9\n",
        "text.pbm": b"P1\n# text\n3 2\n1 0 1\n0 1 0\n",
    }
    if features.check("libtiff"):
        for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
            found[f"{compression}.tif"] = _saved("RGB", "TIFF", compression=compression)
        found["group4.tiff"] = _saved("1", "TIFF", compression="group4")
    if features.check("webp"):
        found["plain.webp"] = _saved("RGB", "WEBP", quality=70)
        found["lossless.webp"] = _saved("RGBA", "WEBP", lossless=True, exif=_exif(3))
        found["several.webp"] = _frames("RGB", "WEBP", duration=100)
    if features.check("jpg_2000"):
        found["plain.jp2"] = _saved("RGB", "JPEG2000")
        found["tiles.jp2"] = _saved("RGB", "JPEG2000", size=(40, 24), tile_size=(16, 16), num_resolutions=2)
    if "avif" in features.modules and features.check("avif"):
        found["plain.avif"] = _saved("RGB", "AVIF", speed=10)
        found["turned.avif"] = _saved("RGB", "AVIF", speed=10, exif=_exif(6))
    if register_heic():
        for name, options in (("plain.heic", {}), ("turned.heic", {"exif": _exif(6)})):
            try:
                found[name] = _saved("RGB", "HEIF", size=(64, 48), **options)
            except Exception:  # built without an encoder
                break
    return found


TOKENS = (
    b"\xff\xd8", b"\xff\xd9", b"\xff\xc0", b"\xff\xc2", b"\xff\xc4", b"\xff\xda", b"\xff\xdb",
    b"\xff\xdd\x00\x04\x00\x01", b"\xff\xe1", b"Exif\0\0",
    b"MM\0*", b"II*\0", b"IHDR", b"PLTE", b"IDAT", b"IEND\xaeB`\x82", b"tRNS", b"eXIf", b"iCCP", b"acTL", b"fcTL",
    b"fdAT", b"zTXt", b"iTXt", b"GIF89a",
    b"\x21\xf9\x04", b"\x21\xff\x0b", b"\x2c", b"\x3b", b"BM", b"RIFF", b"WEBP", b"VP8 ", b"VP8L", b"VP8X", b"ANIM",
    b"ANMF", b"ftypavif", b"ftypheic",
    b"ftypmif1", b"meta", b"iloc", b"ispe", b"irot", b"\xffO\xffQ", b"jP  \r\n\x87\n", b"jp2h", b"P1\n", b"P6\n",
    b"Pf\n", b"Py\n", b"8BPS", b"\x00\x00\x01\x00",
    b"%!PS-Adobe", b"qoif", b"DDS ", b"SIMPLE  =", b"\x89HDF", b"#define a_width 4\n", b"/* XPM */", b"Radiance",
    b"icns",
)  # fmt: skip
