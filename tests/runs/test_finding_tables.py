"""Tables of copies and outliers, names and the map: read back as written, and refused if damaged."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest

from scan_fast.runs.findings import DuplicateRow, Duplicates, OutlierRow, Outliers
from scan_fast.runs.names import GroupNames
from scan_fast.runs.records import ImageMap
from scan_fast.runs.tables import Assignments

COPIES = Duplicates(
    [DuplicateRow(0, 'a,"b"\n.jpg', "exact", 1.0, 9, 4, 3, "best"), DuplicateRow(0, "c", "near", 0.5, 0, 0, 0, "")]
)
ODD = Outliers([OutlierRow("x", 3, 0.25, 4.5)])
NAMED = GroupNames("digest", {3: "red, 'shoes'", 0: "ünï"})


def written(record: Any, method: str = "dump") -> io.BytesIO:
    file = io.BytesIO()
    getattr(record, method)(file)
    file.seek(0)
    return file


@pytest.mark.parametrize("record", [COPIES, ODD, NAMED], ids=lambda record: type(record).__name__)
def test_findings_and_names_are_read_back(record: Any) -> None:
    assert type(record).load(written(record)) == record


def test_a_map_is_read_back() -> None:
    places = np.array([[0.25, 0.5], [1.0, 0.0]], dtype=np.float32)
    found = ImageMap.load(written(ImageMap(places, "abc")))
    assert found.digest == "abc" and (found.positions == places).all()


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (Duplicates, b"group,path\n", "its columns must be group, path, kind"),
        (Duplicates, b"", "its columns must be"),
        (Outliers, b"path,cluster,similarity,score\nx,one,1,1\n", "invalid literal"),
        (Outliers, b"path,cluster,similarity,score\nx,1\n", "shorter"),
        (GroupNames, b'{"names": {}}', "it must hold assignments and names"),
        (GroupNames, b'{"assignments": "", "names": {"a": "b"}}', "invalid literal"),
        (ImageMap, written(NAMED).read(), "no .npz of arrays"),
        (Assignments, None, "no table of assignments"),
    ],
)
def test_damaged_findings_are_refused(kind: Any, content: bytes | None, message: str) -> None:
    load = kind.load if content is not None else kind.load_parquet
    if content is None:
        pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match=message):
        load(io.BytesIO(content or b"PAR1"))


def table_of(names: dict[int, str]) -> Assignments:
    numbers = np.array([0.5, 0.25])
    return Assignments(["a", "b"], np.array([1, 0]), numbers, numbers, ["train", "test"], ["x", ""], names=names)


@pytest.mark.parametrize("names", [{}, {1: "red"}])
def test_parquet_holds_the_columns_of_the_csv(names: dict[int, str]) -> None:
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    table = table_of(names)
    header = written(table).readline().decode().strip().split(",")
    columns = pyarrow.parquet.read_table(written(table, "dump_parquet"))
    assert columns.column_names == header and ("name" in header) == bool(names)
    assert columns["path"].to_pylist() == ["a", "b"] and columns["cluster"].to_pylist() == [1, 0]
    found = Assignments.load_parquet(written(table, "dump_parquet"))
    assert found.names == names and found.labels == ["x", ""] and found.confidence.tolist() == [0.5, 0.25]


def test_names_do_not_change_what_is_read_back() -> None:
    with_names, without = Assignments.load(written(table_of({1: "red"}))), Assignments.load(written(table_of({})))
    assert with_names.digest == without.digest == table_of({}).digest
    assert with_names.names == {} and with_names.clusters.tolist() == [1, 0]
    moved = Assignments(["a", "b"], np.array([0, 1]), without.confidence, without.margin, ["train", "test"], None)
    assert moved.digest != without.digest
