"""Tables of what the report finds among the images, each as CSV: copies and outliers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, BinaryIO, Literal

from .csv_files import as_text, csv_writer, path_cell, path_of


@dataclass(frozen=True)
class DuplicateRow:
    """One image of a group of copies.

    Attributes:
        group: number of the group, from 0.
        path: the image's path or name.
        kind: "exact" if another image of the group has the same content, else "near".
        similarity: cosine similarity of its embedding to that of the best copy; 1 for the best copy.
        bytes: size of its file; 0 if unknown.
        width, height: of the upright image in pixels; 0 if unknown.
        best: "best" for the copy with the most pixels, among equals the most bytes; else empty.
    """

    group: int
    path: str
    kind: Literal["exact", "near"]
    similarity: float
    bytes: int
    width: int
    height: int
    best: str


@dataclass(frozen=True)
class OutlierRow:
    """An image that is far from its neighbours.

    Attributes:
        path: the image's path or name.
        cluster: its cluster.
        similarity: mean cosine similarity to its neighbours.
        score: by how many deviations that lies below the median of all images.
    """

    path: str
    cluster: int
    similarity: float
    score: float


@dataclass(frozen=True)
class Duplicates:
    """Copies among the images, group by group, the best copy of each first."""

    rows: Sequence[DuplicateRow]

    def dump(self, file: BinaryIO) -> None:
        """Write one row per image."""
        _dump(DuplicateRow, self.rows, file)

    @classmethod
    def load(cls, file: BinaryIO) -> Duplicates:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        return cls([DuplicateRow(*row) for row in _load(DuplicateRow, file)])


@dataclass(frozen=True)
class Outliers:
    """Images that are far from their neighbours, the farthest first."""

    rows: Sequence[OutlierRow]

    def dump(self, file: BinaryIO) -> None:
        """Write one row per image."""
        _dump(OutlierRow, self.rows, file)

    @classmethod
    def load(cls, file: BinaryIO) -> Outliers:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        return cls([OutlierRow(*row) for row in _load(OutlierRow, file)])


_PARSERS: dict[str, Any] = {"int": int, "float": float}  # the one text of any content is the path


def _dump(kind: type[Any], rows: Sequence[Any], file: BinaryIO) -> None:
    with csv_writer(file) as writer:
        writer.writerow(field.name for field in fields(kind))
        writer.writerows(map(_cell, astuple(row)) for row in rows)


def _cell(value: Any) -> Any:
    return f"{value:.6f}" if isinstance(value, float) else path_cell(value) if isinstance(value, str) else value


def _load(kind: type[Any], file: BinaryIO) -> list[list[Any]]:
    parsers = [_PARSERS.get(str(field.type), path_of) for field in fields(kind)]
    with as_text(file) as text:
        header, *rows = list(csv.reader(text)) or [[]]
    if header != [field.name for field in fields(kind)]:
        raise ValueError(f"its columns must be {', '.join(field.name for field in fields(kind))}")
    return [[parse(cell) for parse, cell in zip(parsers, row, strict=True)] for row in rows]
