"""Copies are recognised by their pixels; similar pictures are not copies."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from PIL import Image, ImageFilter
from report_runs import photograph

from scan_fast.evaluation.pictures import Signature, pixel_digest, same_picture


def as_jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")


COPIES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "the same": lambda image: image.copy(),
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2)),
    "a fifth of the size": lambda image: image.resize((image.width // 5, image.height // 5)),
    "quality 30": lambda image: as_jpeg(image, 30),
    "half, and quality 50": lambda image: as_jpeg(image.resize((image.width // 2, image.height // 2)), 50),
    "slightly blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
}
OTHERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "another crop": lambda image: image.crop((image.width // 8, 0, image.width, image.height * 7 // 8)),
    "grey": lambda image: image.convert("L").convert("RGB"),
    "squeezed": lambda image: image.resize((image.width, image.height // 2)),
    "much brighter": lambda image: image.point(lambda value: min(255, value + 40)),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("seed", range(6))
def test_copies_are_recognised(name: str, seed: int) -> None:
    image = photograph(seed, (320, 240) if seed % 2 else (200, 300))
    assert same_picture(Signature(image), Signature(COPIES[name](image)))
    assert same_picture(Signature(COPIES[name](image)), Signature(image))


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("seed", range(6))
def test_what_was_changed_is_no_copy(name: str, seed: int) -> None:
    image = photograph(seed)
    assert not same_picture(Signature(image), Signature(OTHERS[name](image)))


def test_different_pictures_are_no_copies() -> None:
    signatures = [Signature(photograph(seed)) for seed in range(30)]
    assert not any(same_picture(a, b) for i, a in enumerate(signatures) for b in signatures[:i])


def test_even_areas_are_told_apart_by_their_colour() -> None:
    red, other, blue = (Signature(Image.new("RGB", (64, 64), c)) for c in ((200, 0, 0), (203, 1, 0), (0, 0, 200)))
    assert same_picture(red, other) and not same_picture(red, blue)


def test_tiny_pictures_are_never_called_copies() -> None:
    image = photograph(3).resize((31, 31))
    assert not same_picture(Signature(image), Signature(image))


def test_the_digest_is_of_size_and_pixels() -> None:
    wide, tall = Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4))
    assert pixel_digest(wide) == pixel_digest(wide.copy()) != pixel_digest(tall)
    wide.putpixel((3, 1), (0, 0, 1))
    assert pixel_digest(wide) != pixel_digest(Image.new("RGB", (4, 2)))
