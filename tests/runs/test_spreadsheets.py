"""No cell of a CSV is a formula, numbers are untouched, and our own readers find the names again."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
import torch

from scan_fast.runs.comparison import Comparison, Result
from scan_fast.runs.csv_files import path_cell, path_of, text_cell, text_of
from scan_fast.runs.findings import DuplicateRow, Duplicates, OutlierRow, Outliers
from scan_fast.runs.tables import Assignments, Confusion, Placements, Predictions, Skipped
from scan_fast.runs.variants import COLUMNS, VariantTable

NAMES = [
    "=cmd.jpg",
    "-1.jpg",
    "+2.jpg",
    "@a.jpg",
    "\t=b.jpg",
    "\r=c.jpg",
    "＝d.jpg",
    "'=e.jpg",
    "./=f.jpg",
    "\udcff.jpg",
]


def cells(table: Any) -> list[list[str]]:
    file = io.BytesIO()
    getattr(table, "dump_csv" if isinstance(table, Comparison) else "dump")(file)
    return list(csv.reader(io.StringIO(file.getvalue().decode(), newline="")))


def again(table: Any) -> Any:
    file = io.BytesIO()
    table.dump(file)
    file.seek(0)
    return type(table).load(file)


def half(n: int) -> torch.Tensor:
    return torch.full((n, 2), 0.5)


def tables() -> list[Any]:
    n = len(NAMES)
    plain = Predictions.of(NAMES, half(n))
    named = {0: "=group", 1: "-"}
    return [
        Predictions(**{**vars(plain), "names": named}),
        Placements(
            **{**vars(plain), "names": named}, similarity=np.full(n, -0.5, np.float32), unlike=np.zeros(n, bool)
        ),
        Assignments(**vars(plain), splits=["train"] * n, labels=NAMES),
        Skipped([(name, f"={name}") for name in NAMES]),
        Confusion.of(np.zeros((n, n), np.int64), NAMES),
        Duplicates([DuplicateRow(0, name, "near", -0.25, 0, 0, 0, "") for name in NAMES]),
        Outliers([OutlierRow(name, 0, -0.25, -3.0) for name in NAMES]),
        VariantTable([{**dict.fromkeys(COLUMNS), "variant": name, "seeds": 1, "acc_mean": -0.5} for name in NAMES]),
        Comparison(NAMES, [Result(name, "=stage", ari=-0.1) for name in NAMES], []),
    ]


@pytest.mark.parametrize("number", range(9))
def test_no_cell_is_a_formula_but_numbers_stay(number: int) -> None:
    found = [cell for row in cells(tables()[number]) for cell in row if cell]
    for cell in found:
        if cell.startswith(tuple("=+-@＝＋－＠\t\r")):
            float(cell)
    if number in (1, 5, 6, 7, 8):
        assert any(cell.startswith("-0.") for cell in found)
    assert len(cells(tables()[number])) == len(NAMES) + 1


def test_names_are_read_back_from_every_table() -> None:
    predictions, _, assignments, skipped, confusion, duplicates, outliers, variants, _ = tables()
    assert predictions.to_csv().splitlines()[1] == "./=cmd.jpg,0,0.500000,0.000000,'=group"
    assert list(again(assignments).paths) == again(assignments).labels == NAMES
    assert [name for name, _ in again(skipped).images] == NAMES
    assert again(skipped).images[0][1] == "==cmd.jpg"
    assert again(confusion).row_names == again(confusion).column_names == NAMES
    assert [row.path for row in again(duplicates).rows] == [row.path for row in again(outliers).rows] == NAMES
    assert [row["variant"] for row in again(variants).rows] == NAMES
    assert again(assignments).digest == assignments.digest


def test_names_that_are_numbers_or_plain_stay_as_they_are() -> None:
    for text in ("-1", "+2.5", "-1e3", "a.jpg", "./a.jpg", "'a", "a=b", "", "..", "dir/=x.jpg"):
        assert path_cell(text) == text_cell(text) == path_of(text) == text_of(text) == text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (f"path,cluster,confidence,margin,split\na,{10**30},1,1,train\n", "cluster must be below 1000000"),
        (f"path,cluster,confidence,margin,split\na,{'9' * 5000},1,1,train\n", "is no row of assignments"),
        ("path,cluster,confidence,margin,split\n" + "a" * 200_000 + ",1,1,1,train\n", "it is no CSV: field larger"),
        ('path,cluster,confidence,margin,split\n"' + "a,\n" * 100_000, "it is no CSV: field larger"),
    ],
)
def test_hostile_assignments_are_refused_with_a_reason(content: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Assignments.load(io.BytesIO(content.encode()))
    with pytest.raises(ValueError, match=r"a count is negative or too large|rows differ|no CSV|invalid literal|4300"):
        Confusion.load(io.BytesIO(content.replace("a,", "t,").replace("path", "x,y").encode()))
