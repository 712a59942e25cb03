"""Containers of an attacker: sizes that are not there, values without end, and code in place of data."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tarfile
from pathlib import Path
from typing import Any

import pytest
from containers import Item, encoded, write_parquet, write_tar
from hostile_files import Marker
from images import varied

from scan_fast.data import DataConfig, open_splits
from scan_fast.data.containers import expand_braces
from scan_fast.data.kinds import parquet
from scan_fast.data.kinds.webdataset import Member, read_member
from scan_fast.errors import DataError

IMAGE = encoded(varied(1, 8, 8)[0].numpy())


def opened(source: str, **options: Any) -> Any:
    return open_splits(
        DataConfig.model_validate({"source": source, "image_size": 8, "resident": "files", **options})
    ).train


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_a_tar_member_that_is_said_to_be_huge(kind: bytes, tmp_path: Path) -> None:
    """No memory is taken for bytes that are not there."""
    file = tmp_path / "a.tar"
    write_tar(file, {"a.jpg": IMAGE})
    data = file.read_bytes()
    end = 512 + 512 * -(-len(IMAGE) // 512)
    file.write_bytes(data[:end] + header("b.jpg", 1 << 60, kind) + IMAGE)
    source = opened(f"webdataset:{file}", on_error="skip")
    assert list(source.paths) == ["a.tar: a.jpg"] and source.skipped
    with file.open("rb") as open_file, pytest.raises(OSError, match=r"ends after \d+ of the 1152921504606846976 bytes"):
        read_member(open_file.fileno(), Member("b.jpg", 512, 1 << 60))


@pytest.mark.parametrize(
    ("extension", "label", "reason"),
    [
        ("json", b'{"a": ' * 100_000, "its label cannot be read"),
        ("json", b'{"label": ' + b"9" * 5000 + b"}", "its label cannot be read"),
        ("cls", b"x" * (2 << 20), "and a label at most 1,048,576"),
    ],
)
def test_hostile_labels_are_named(extension: str, label: bytes, reason: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", {"a.jpg": IMAGE, "b.jpg": IMAGE, f"b.{extension}": label})
    with pytest.raises(DataError, match=reason):
        opened(f"webdataset:{tmp_path / 'a.tar'}")


def test_nothing_of_a_tar_file_is_unpacked(tmp_path: Path) -> None:
    write_tar(tmp_path / "in" / "a.tar", {"../../outside.jpg": IMAGE, "/absolute.jpg": IMAGE, "c.jpg": IMAGE})
    with tarfile.open(tmp_path / "in" / "a.tar", "a") as archive:
        link = tarfile.TarInfo("d.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(opened(f"webdataset:{tmp_path / 'in' / 'a.tar'}")) == 3
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.tar"]


def test_braces_stand_for_few_paths() -> None:
    assert expand_braces("a{1..3}{x,y}") == ["a1x", "a1y", "a2x", "a2y", "a3x", "a3y"]
    for pattern in ("{0..999999999999}", "{0..999}" * 3, "{1.." + "9" * 5000 + "}", "{a,b}" * 100):
        with pytest.raises(DataError, match="stand for more than 100,000 paths"):
            expand_braces(pattern)


def test_long_lists_of_classes_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(IMAGE)
    with (tmp_path / "classes.txt").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"data\.classes_file: .* and a list of names at most 16,777,216"):
        opened("folder", root=tmp_path / "images", classes_file=tmp_path / "classes.txt")


# -- Parquet -----------------------------------------------------------------------------------------------------------


def test_values_that_parquet_repeats_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    image = IMAGE + bytes(1 << 16)
    table = pa.table({"image": pa.array([image] * 2000, pa.binary()), "label": ["x" * 4096] * 2000})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=True, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000  # 130 MB in memory
    monkeypatch.setattr(parquet, "_ALWAYS", 1 << 20)
    with pytest.raises(DataError, match="its labels have more than 1024 bytes each"):
        opened(f"parquet:{tmp_path / 'a.parquet'}")
    monkeypatch.setattr(parquet, "_LARGEST_SHARE", 0)
    with pytest.raises(
        DataError, match="column image of its row group takes more than 1,048,576 bytes of memory; write"
    ):
        opened(f"parquet:{tmp_path / 'a.parquet'}", labels="none")


def test_more_rows_than_bytes_are_refused(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"image": pa.nulls(1_000_000, pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"is said to have 1,000,000 rows, in .* bytes: it is no table of images"):
        opened(f"parquet:{tmp_path / 'a.parquet'}")


def test_rows_that_name_no_plain_file_are_refused(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("datasets")
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in ("/dev/zero", "pipe.jpg"):
        rows = [{"bytes": IMAGE, "path": None}, {"bytes": None, "path": path}]
        pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
        with pytest.raises(DataError, match="which is no plain file"):
            opened(f"parquet:{tmp_path / 'a.parquet'}")
    write_parquet(tmp_path / "good", [Item(str(n), IMAGE) for n in range(3)])


# -- code --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cifar10", "cifar20"])
def test_pickles_in_place_of_cifar_are_not_run(name: str, tmp_path: Path) -> None:
    """torchvision unpickles the files after comparing their checksums, and so only the published ones."""
    marker = tmp_path / "executed"
    for folder in ("cifar-10-batches-py", "cifar-100-python"):
        (tmp_path / folder).mkdir()
        for file in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta", "train", "test", "meta"):
            (tmp_path / folder / file).write_bytes(pickle.dumps({"data": Marker(marker)}))
    with pytest.raises(DataError, match=f"{name} cannot be opened"):
        opened(name, root=tmp_path, download=False)
    assert not marker.exists()


def test_a_data_set_with_a_program_or_a_pickle_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    marker = tmp_path / "executed"
    for suffix in (".pandas", ".pkl", ".py", ".pickle", ""):
        file = tmp_path / f"own{suffix}"
        file.write_bytes(pickle.dumps(Marker(marker)))
        with pytest.raises(DataError, match=r"a single file must end in \.parquet, \.arrow, \.csv, \.json, \.jsonl"):
            opened(f"hf:{file}")
    program = tmp_path / "program"
    program.mkdir()
    (program / "program.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(DataError, match="cannot be opened"):
        opened(f"hf:{program}", root=tmp_path / "cache")
    assert not marker.exists()


def test_the_header_of_a_tar_file_is_well_formed() -> None:
    """The files above are hostile, not merely broken."""
    data = header("a.jpg", 8) + bytes(512) + bytes(1024)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        assert [(info.name, info.size) for info in archive] == [("a.jpg", 8)]
    assert struct.calcsize("512s") == len(header("a.jpg", 8))
