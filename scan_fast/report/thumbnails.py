"""Inline thumbnails of the images that show a cluster."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from PIL import Image

from ..errors import DataError
from ..evaluation.prototypes import prototypes
from ..runs.tables import Assignments
from .charts import number

Images = Callable[[str, list[int]], list[Image.Image]]

TYPICAL_IMAGES = 16
UNCERTAIN_IMAGES = 8
_THUMBNAIL = 96  # pixels


@dataclass
class Thumbnail:
    """One image of a cluster: its place in the assignments and, once loaded, its data URL."""

    index: int
    name: str
    tooltip: str
    url: str = ""


def choose(table: Assignments, cluster: int) -> tuple[list[Thumbnail], list[Thumbnail]]:
    """Return the thumbnails of a cluster's typical images, and of its uncertain ones, without their pictures."""
    chosen = prototypes(
        table.clusters,
        table.confidence,
        table.margin,
        cluster,
        typical=TYPICAL_IMAGES,
        uncertain=UNCERTAIN_IMAGES,
    )
    return _thumbnails(chosen.typical, table), _thumbnails(chosen.uncertain, table)


def _thumbnails(rows: Iterable[int], table: Assignments) -> list[Thumbnail]:
    thumbnails = []
    for index in rows:
        path = table.paths[index]
        parts = [path, f"confidence {number(table.confidence[index])}"]
        if table.labels is not None and table.labels[index]:
            parts.append(f"labelled {table.labels[index]}")
        name = path.replace("\\", "/").rsplit("/", 1)[-1] or path
        thumbnails.append(Thumbnail(index, name, " · ".join(parts)))
    return thumbnails


def load(thumbnails: Sequence[Thumbnail], table: Assignments, images: Images) -> None:
    """Fill in the thumbnails' data URLs; those of images that cannot be read stay empty.

    Raises:
        ValueError: if ``images`` returns another number of pictures than asked.
    """
    row_in_split = table.rows
    by_split: dict[str, list[Thumbnail]] = {}
    for thumbnail in thumbnails:
        by_split.setdefault(table.splits[thumbnail.index], []).append(thumbnail)
    for split, wanted in by_split.items():
        rows = [int(row_in_split[thumbnail.index]) for thumbnail in wanted]
        try:
            pictures: list[Image.Image | None] = list(images(split, rows))
        except (OSError, DataError):
            pictures = [_one_image(images, split, row) for row in rows]
        if len(pictures) != len(rows):
            raise ValueError(f"images({split!r}, ...) must return {len(rows)} pictures, got {len(pictures)}")
        for thumbnail, picture in zip(wanted, pictures, strict=True):
            thumbnail.url = _data_url(picture) if picture is not None else ""


def _one_image(images: Images, split: str, row: int) -> Image.Image | None:
    try:
        return images(split, [row])[0]
    except (OSError, DataError):
        return None


def _data_url(picture: Image.Image) -> str:
    picture = picture.convert("RGB")
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), Image.Resampling.LANCZOS)
    # Tiny images (digits) would show JPEG's blocks and cost little anyway.
    small = max(picture.size) <= 40
    buffer = io.BytesIO()
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=80)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
