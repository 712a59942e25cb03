"""The tables of a run: what is written is read back, and what is damaged is refused."""

from __future__ import annotations

import csv
import io
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast.runs.tables import Assignments, Confusion, Predictions, Skipped

NAMES = st.text(max_size=12) | st.text("./'=+-@\\x5c8fud\r\n\t\"\udcff", max_size=12)


def written(table: Any) -> io.BytesIO:
    file = io.BytesIO()
    table.dump(file)
    file.seek(0)
    return file


def test_predictions_are_the_most_probable_clusters() -> None:
    probabilities = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]])
    table = Predictions.of(["a", "b"], probabilities)
    assert table.clusters.tolist() == [0, 1]
    assert table.to_csv() == "path,cluster,confidence,margin\na,0,0.500000,0.250000\nb,1,0.750000,0.625000\n"


@settings(max_examples=100, deadline=None)
@given(paths=st.lists(NAMES, max_size=6), labelled=st.booleans(), data=st.data())
def test_assignments_are_read_back(paths: list[str], labelled: bool, data: st.DataObject) -> None:
    n = len(paths)
    fractions = st.lists(st.integers(0, 10**6), min_size=n, max_size=n)
    table = Assignments(
        paths,
        np.array(data.draw(st.lists(st.integers(0, 99), min_size=n, max_size=n)), dtype=np.int64),
        np.array(data.draw(fractions)) / 1e6,
        np.array(data.draw(fractions)) / 1e6,
        data.draw(st.lists(st.sampled_from(["train", "test"]), min_size=n, max_size=n)),
        data.draw(st.lists(NAMES, min_size=n, max_size=n)) if labelled else None,
    )
    found = Assignments.load(written(table))
    assert list(found.paths) == paths
    assert found.clusters.tolist() == table.clusters.tolist()
    assert found.confidence.tolist() == table.confidence.tolist()
    assert found.margin.tolist() == table.margin.tolist()
    assert found.splits == table.splits
    assert found.labels == table.labels


def test_assignments_are_counted_and_joined_by_split() -> None:
    parts = {
        "train": Predictions.of(["a", "b"], torch.tensor([[0.75, 0.25], [0.25, 0.75]])),
        "test": Predictions.of(["c"], torch.tensor([[0.5, 0.5]])),
    }
    table = Assignments.join(parts, {"train": ["x", ""], "test": ["y"]})
    assert written(table).read().decode().splitlines() == [
        "path,cluster,confidence,margin,split,label",
        "a,0,0.750000,0.500000,train,x",
        "b,1,0.750000,0.500000,train,",
        "c,0,0.500000,0.000000,test,y",
    ]
    assert table.rows.tolist() == [0, 1, 0]
    assert written(Assignments.join(parts, None)).readline() == b"path,cluster,confidence,margin,split\n"


def test_any_file_name_fits_into_one_row() -> None:
    names = [
        "with, comma",
        'with "quotes"',
        "ümläut 写真",
        "new\nline",
        "carriage\rreturn",
        "both\r\n",
        "bad\udcff",
        "",
    ]
    table = Predictions.of(names, torch.full((len(names), 2), 0.5))
    # Read by another's rules.
    rows = list(csv.reader(io.StringIO(table.to_csv())))
    escaped = [r"new\x0aline", r"carriage\x0dreturn", r"both\x0d\x0a", r"bad\xff", ""]
    assert [row[0] for row in rows[1:]] == [*names[:3], *escaped]
    assert {len(row) for row in rows} == {4} and len(table.to_csv().splitlines()) == 9


def test_skipped_images_are_read_back() -> None:
    table = Skipped([("a,b.png", "OSError: cut\n off"), ("c", "closed")])
    file = written(table)
    assert file.read().startswith(b"path,reason\n")
    file.seek(0)
    assert Skipped.load(file).images == [("a,b.png", "OSError: cut off"), ("c", "closed")]


def test_confusion_is_read_back() -> None:
    table = Confusion.of([[90, 0, 10], [0, 0, 0]], ["a, $b", "c"])
    assert table.shares.tolist() == [[0.9, 0.0, 0.1], [0.0, 0.0, 0.0]]
    file = written(table)
    assert file.read().decode().splitlines() == ['true \\ assigned,"a, $b",c,(unmatched)', '"a, $b",90,0,10', "c,0,0,0"]
    file.seek(0)
    found = Confusion.load(file)
    assert (found.row_names, found.column_names) == (table.row_names, table.column_names)
    assert found.counts.tolist() == table.counts.tolist()
    with pytest.raises(ValueError, match=r"\(3, 3\) or \(3, 4\) for 3 class names, got \(2, 3\)"):
        Confusion.of(table.counts, ["a", "b", "c"])


@pytest.mark.parametrize("content", [b"", b"t,a,b\na,1,2\nb,3\n", b"t,a\na,x\n", b"\xff"])
def test_what_is_no_confusion_matrix_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):
        Confusion.load(io.BytesIO(content))
