"""The table of an ablation: one row for each variant of a configuration."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from typing import Any, BinaryIO

from .csv_files import as_text, csv_writer, text_cell, text_of

MEASURES = ("acc", "nmi", "ari", "purity", "seconds")
"""The measures that are compared: accuracy, normalised mutual information and adjusted Rand index of the last stage's
groups, purity of the mined neighbours, and the time of a run."""
COLUMNS = (
    "variant",
    "seeds",
    *(f"{measure}_{figure}" for measure in MEASURES[:-1] for figure in ("mean", "std", "best")),
    *("seconds_mean", "seconds_std"),
)


@dataclass(frozen=True)
class VariantTable:
    """Mean, standard deviation and best of each measure of each variant.

    Attributes:
        rows: by column; what is not known is None.
    """

    rows: list[dict[str, str | int | float | None]]

    def dump(self, file: BinaryIO) -> None:
        """Write CSV."""
        with csv_writer(file) as writer:
            writer.writerow(COLUMNS)
            writer.writerows([_cell(row.get(name)) for name in COLUMNS] for row in self.rows)

    @classmethod
    def load(cls, file: BinaryIO) -> VariantTable:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        with as_text(file) as text:
            reader = csv.DictReader(text, strict=True)
            if tuple(reader.fieldnames or ()) != COLUMNS:
                raise ValueError(f"the columns must be {', '.join(COLUMNS)}, got {reader.fieldnames}")
            return cls([{name: _value(name, row[name]) for name in COLUMNS} for row in map(_whole, reader)])


def _whole(row: dict[str | None, Any]) -> dict[str | None, Any]:
    if None in row:  # the cells beyond the last column
        raise ValueError(f"a row has {len(row[None])} cells too many")
    return row


def _cell(value: str | int | float | None) -> str | int | float:
    return "" if value is None else text_cell(value) if isinstance(value, str) else value


def _value(column: str, cell: str | None) -> str | int | float | None:
    if cell is None:
        raise ValueError("a row ends early")
    if column == "variant":
        return text_of(cell)
    return None if cell == "" else int(cell) if column == "seeds" else float(cell)
