"""Which images stand for a cluster, and their inline thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .charts import number
from .run_files import Assignments

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


def choose(data: Assignments, cluster: int) -> tuple[list[Thumbnail], list[Thumbnail]]:
    """Return the most confident members of a cluster, and the least confident of the others, each most telling first.

    Equal confidences are ordered by the margin, then by row; an unknown confidence counts as the lowest.
    """
    members = np.flatnonzero(data.clusters == cluster)
    confidence, margin = np.nan_to_num(data.confidence[members], nan=-1), np.nan_to_num(data.margin[members], nan=-1)
    ordered = members[np.lexsort((members, -margin, -confidence))]
    typical, rest = ordered[:TYPICAL_IMAGES], ordered[TYPICAL_IMAGES:]
    uncertain = rest[::-1][:UNCERTAIN_IMAGES]
    return [_thumbnail(int(i), data) for i in typical], [_thumbnail(int(i), data) for i in uncertain]


def _thumbnail(index: int, data: Assignments) -> Thumbnail:
    path = data.paths[index]
    parts = [path, f"confidence {number(data.confidence[index])}"]
    if data.labels is not None and data.labels[index] not in ("", "-1"):
        parts.append(f"labelled {data.labels[index]}")
    name = path.replace("\\", "/").rsplit("/", 1)[-1] or path
    return Thumbnail(index, name, " · ".join(parts))


def load(thumbnails: Sequence[Thumbnail], data: Assignments, images: Images) -> None:
    """Fill in the thumbnails' data URLs; those of images that cannot be read stay empty.

    Raises:
        ValueError: where ``images`` returns another number of pictures than asked.
    """
    by_split: dict[str, list[Thumbnail]] = {}
    for thumbnail in thumbnails:
        by_split.setdefault(data.splits[thumbnail.index], []).append(thumbnail)
    for split, wanted in by_split.items():
        rows = [int(data.rows[t.index]) for t in wanted]
        try:
            pictures: list[Image.Image | None] = list(images(split, rows))
        except OSError:
            pictures = [_one_image(images, split, row) for row in rows]
        if len(pictures) != len(rows):
            raise ValueError(f"images({split!r}, ...) must return {len(rows)} pictures, got {len(pictures)}")
        for thumbnail, picture in zip(wanted, pictures, strict=True):
            thumbnail.url = _data_url(picture) if picture is not None else ""


def _one_image(images: Images, split: str, row: int) -> Image.Image | None:
    try:
        return images(split, [row])[0]
    except OSError:
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
