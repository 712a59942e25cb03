"""Formats of image files: their suffixes, whether they can be read here, and what they need otherwise."""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import NamedTuple

from PIL import Image, features

from ..errors import MissingPackageError


class Format(NamedTuple):
    """A format of image files.

    Attributes:
        name: as people call it.
        suffixes: of its files, in lower case.
        feature: what PIL must be built with, by the name in ``PIL.features``; "" if every PIL reads the format, "heic"
            if the package pillow-heif does.
        remedy: what to install if it cannot be read.
    """

    name: str
    suffixes: tuple[str, ...]
    feature: str = ""
    remedy: str = ""


#: Image files are recognised by suffix, whether or not they can be read here, so that none is left out silently.
FORMATS = (
    Format("JPEG", (".jpg", ".jpeg", ".jpe", ".jfif"), "jpg", "pip install --upgrade pillow"),
    Format("JPEG 2000", (".jp2",), "jpg_2000", "pip install --upgrade pillow"),
    Format("PNG", (".png", ".apng"), "zlib", "pip install --upgrade pillow"),
    Format("GIF", (".gif",)),
    Format("BMP", (".bmp",)),
    Format("TIFF", (".tif", ".tiff"), "libtiff", "pip install --upgrade pillow"),
    Format("WebP", (".webp",), "webp", "pip install --upgrade pillow"),
    Format("AVIF", (".avif",), "avif", "pip install --upgrade 'pillow>=11.3'"),
    Format("HEIC", (".heic", ".heif", ".hif"), "heic", "pip install 'scan-fast[heic]'"),
    Format("PNM", (".ppm", ".pgm", ".pbm", ".pnm")),
)

IMAGE_SUFFIXES = frozenset(suffix for format in FORMATS for suffix in format.suffixes)

_PLUGINS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP", "AVIF", "HEIF")

# Brands in the first box of a file of the family of HEIF.
_BRANDS = {
    "HEIC": (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"),
    "AVIF": (b"avif", b"avis"),
}
_lock = threading.Lock()
_registered: bool | None = None


def missing_formats() -> dict[str, str]:
    """Return the formats that cannot be read here, each with what to install."""
    return {format.name: format.remedy for format in FORMATS if not _readable(format)}


def _readable(format: Format) -> bool:
    if format.feature == "heic":
        return register_heic()
    # A PIL that does not know the feature warns, and cannot read the format.
    known = format.feature in {*features.modules, *features.codecs, *features.features}
    return not format.feature or (known and bool(features.check(format.feature)))


def register_heic() -> bool:
    """Let PIL open HEIC with the package pillow-heif; return whether it is installed. Only the first call has work."""
    global _registered
    with _lock:
        if _registered is None:
            try:
                from pillow_heif import register_heif_opener
            except ImportError:
                _registered = False
            else:
                register_heif_opener()
                _registered = True
        return _registered


@cache
def _import_plugins() -> None:
    for name in ("Bmp", "Gif", "Jpeg", "Jpeg2K", "Mpo", "Png", "Ppm", "Tiff", "WebP", "Avif"):
        with suppress(ImportError):  # an older PIL has none for AVIF
            import_module(f"PIL.{name}ImagePlugin")


def plugins() -> tuple[str, ...]:
    """Return the formats that PIL may try, whatever the suffix of a file says: those of :data:`FORMATS`.

    PIL knows some thirty more. It hands EPS files to the program ghostscript, and few people test the others.
    """
    _import_plugins()
    return tuple(name for name in _PLUGINS if name in Image.OPEN)


def prepare(start: bytes) -> bool:
    """Make PIL ready to read an image that it does not know; return whether it may know it now.

    Args:
        start: the first 12 bytes of the image or more.

    Raises:
        MissingPackageError: if the image is of a format that another package reads; the message names it.
    """
    brand = start[8:12] if start[4:8] == b"ftyp" else b""
    name = next((name for name, brands in _BRANDS.items() if brand in brands), None)
    format = next((format for format in FORMATS if format.name == name), None)
    if format is None:
        return False
    if not _readable(format):
        package = "the package pillow-heif" if format.feature == "heic" else "a newer Pillow"
        raise MissingPackageError(f"{format.name} images need {package}: {format.remedy}")
    return format.feature == "heic"
