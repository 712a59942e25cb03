"""One image for each cluster, as a picture and as a table."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..atomic import atomic_file
from ..data.sources import Source
from ..evaluation.prototypes import central_prototypes
from ..runs.csv_files import csv_writer, path_cell, text_cell
from .figures import plain

TILE = 160
"""Side in pixels of an image in the picture."""

SMALL_TILE = 96
"""The same if there are more clusters than :data:`MANY`."""

MANY = 60
_GAP, _LINE = 12, 17  # pixels
_DPI = 100
_GREY, _PAPER = 225, 255


@dataclass(frozen=True)
class Prototype:
    """The image that shows a cluster.

    Attributes:
        cluster: its number.
        class_name: the class that it is matched to, empty for none; None without classes.
        path: the image's path or name.
        split: "train", "test", or empty for images that are no split of a run.
        row: number of the image within its split.
        confidence: probability of the cluster.
        distance: Euclidean distance to the mean feature of the cluster's most confident members.
    """

    cluster: int
    class_name: str | None
    path: str
    split: str
    row: int
    confidence: float
    distance: float


def find_prototypes(
    source: Source, probabilities: Tensor, features: Tensor, class_of: Sequence[str] | None = None, split: str = ""
) -> list[Prototype]:
    """Choose the image of each cluster that has any; see :func:`.evaluation.prototypes.central_prototypes`.

    Args:
        source: N images.
        probabilities: (N, K) float32.
        features: (N, D) float32.
        class_of: K names of the clusters' classes, empty for none; None without classes.
        split: the split that the source is.
    """
    rows, distances = central_prototypes(features, probabilities)
    return [
        Prototype(
            cluster=cluster,
            class_name=None if class_of is None else class_of[cluster],
            path=source.paths[row],
            split=split,
            row=row,
            confidence=float(probabilities[row, cluster]),
            distance=distance,
        )
        for cluster, (row, distance) in enumerate(zip(rows.tolist(), distances.tolist(), strict=True))
        if row >= 0
    ]


def write_prototypes(
    file: Path, source: Source, found: Sequence[Prototype], n_clusters: int, names: Mapping[int, str] | None = None
) -> Path:
    """Write the picture and, beside it with the suffix .csv, the table.

    Args:
        file: the picture, a PNG.
        source: the images that the rows count.
        found: the prototypes.
        n_clusters: K, so that empty clusters are shown as such.
        names: the names that a user gave to clusters.

    Returns:
        The path of the table.

    Raises:
        OSError: if a file cannot be written.
    """
    table = file.with_suffix(".csv")
    picture = prototypes_png(source, found, n_clusters, names or {})
    with atomic_file(file) as target:
        target.write(picture)
    with atomic_file(table) as target, csv_writer(target) as writer:
        labelled = any(each.class_name is not None for each in found)
        writer.writerow(("cluster", *(["class"] if labelled else []), "path", "split", "row", "confidence", "distance"))
        for each in found:
            own = [text_cell(each.class_name or "")] if labelled else []
            numbers = (f"{each.confidence:.6f}", f"{each.distance:.6f}")
            writer.writerow((each.cluster, *own, path_cell(each.path), text_cell(each.split), each.row, *numbers))
    return table


def prototypes_png(source: Source, found: Sequence[Prototype], n_clusters: int, names: Mapping[int, str]) -> bytes:
    """Draw one original image for each cluster, with its number, class and confidence, and return it as PNG.

    Small images are enlarged by a whole number, so that their pixels show. An image that can no longer be read, and an
    empty cluster, are grey.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    side = TILE if n_clusters <= MANY else SMALL_TILE
    columns = min(n_clusters, 10 if n_clusters <= MANY else math.ceil(math.sqrt(1.5 * n_clusters)))
    labelled = any(each.class_name is not None for each in found)
    lines = 3 if labelled else 2
    wide, high = side + _GAP, side + _GAP + lines * _LINE
    size = (math.ceil(n_clusters / columns) * high + _GAP, columns * wide + _GAP)
    canvas: NDArray[np.uint8] = np.full((*size, 3), _PAPER, dtype=np.uint8)
    figure = Figure(figsize=(size[1] / _DPI, size[0] / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    by_cluster = {each.cluster: each for each in found}
    longest = side // 7  # letters of about seven pixels
    for cluster in range(n_clusters):
        left, top = _GAP + cluster % columns * wide, _GAP + cluster // columns * high
        each = by_cluster.get(cluster)
        tile = None if each is None else _tile(source, each.row, side)
        canvas[top : top + side, left : left + side] = _GREY if tile is None else tile
        text = [names.get(cluster, f"cluster {cluster}")]
        if each is None:
            text.append("no image")
        else:
            text += [each.class_name or "no class"] * labelled
            text.append(f"conf. {100 * each.confidence:.1f} %" + (" (unreadable)" if tile is None else ""))
        for number, line in enumerate(text):
            figure.text(
                left / size[1],
                1 - (top + side + (number + 0.8) * _LINE) / size[0],
                plain(line, longest),
                fontsize=8.5,
                fontweight="bold" if number == 0 else "normal",
            )
    figure.figimage(canvas)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _tile(source: Source, row: int, side: int) -> NDArray[np.uint8] | None:
    """Return an original image in the middle of a white square, (side, side, 3); None if it cannot be read."""
    try:
        picture = source.original(row, side)
    except (OSError, ValueError):  # DataError is a ValueError
        return None
    factor = side // max(picture.size)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    square = Image.new("RGB", (side, side), (_PAPER,) * 3)
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(square)
