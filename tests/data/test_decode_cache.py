"""Record of decoded files: decodings that it saves, and entries that do not count."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image

from scan_fast.data import DataConfig, checking, encoded, open_splits
from scan_fast.data.decode import decode
from scan_fast.data.decode_cache import DecodeCache


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return twenty readable photographs and a broken one, written a day ago."""
    # No program can set the time of an inode's change back.
    monkeypatch.setattr(encoded, "SETTLED_NS", 0)
    root = tmp_path / "photos"
    root.mkdir()
    for i, pixels in enumerate(varied(20, 30, 40).numpy()):
        Image.fromarray(pixels).save(root / f"{i}.jpg")
    (root / "broken.jpg").write_bytes(b"no photograph")
    for path in root.iterdir():
        age(path)
    return root


def age(path: Path, seconds: float = 86_400) -> None:
    past = path.stat().st_mtime - seconds
    os.utime(path, (past, past))


def opened(
    folder: Path, record: bytes, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> tuple[list[str], Any, bytes]:
    """Open the folder; return the names of the files that were decoded, the training source and the new record."""
    decoded: list[str] = []

    def noted(path: str, *arguments: Any, **words: Any) -> Any:
        decoded.append(os.path.basename(path))
        return decode(path, *arguments, **words)

    config = {"root": folder, "image_size": 8, "on_error": "skip", "resident": "files", "test_fraction": 0.5, **options}
    with monkeypatch.context() as patch:
        patch.setattr(checking, "decode", noted)
        checked = DecodeCache(record)
        splits = open_splits(DataConfig.model_validate(config), checked)
    return sorted(decoded), splits, checked.to_bytes()


NAMES = sorted([*(f"{i}.jpg" for i in range(20)), "broken.jpg"])


def test_a_second_start_decodes_only_what_was_broken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded, first, record = opened(folder, b"", monkeypatch)
    assert decoded == NAMES
    decoded, second, again = opened(folder, record, monkeypatch)
    assert decoded == ["broken.jpg"] and again == record
    for one, two in ((first.train, second.train), (first.test, second.test)):
        assert one.paths == two.paths and one.skipped == two.skipped
        assert [one.files.header(i) for i in range(len(one))] == [two.files.header(i) for i in range(len(two))]
        everything = torch.arange(len(one))
        assert np.array_equal(one.read(everything), two.read(everything))
    assert not DecodeCache(record).changed


def test_changed_and_new_files_are_decoded_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, record = opened(folder, b"", monkeypatch)
    age(folder / "2.jpg", seconds=1)  # another time, the same size
    content = (folder / "4.jpg").read_bytes()
    status = (folder / "4.jpg").stat()
    (folder / "4.jpg").write_bytes(content[:-20])  # the same time, another size
    os.utime(folder / "4.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    (folder / "6.jpg").rename(folder / "7b.jpg")  # another name
    decoded, splits, new = opened(folder, record, monkeypatch)
    assert decoded == ["2.jpg", "4.jpg", "7b.jpg", "broken.jpg"]
    assert {path for path, _ in splits.train.skipped + splits.test.skipped} == {"4.jpg", "broken.jpg"}
    assert {os.path.basename(path) for path in json.loads(new)["files"]} == {*NAMES, "7b.jpg"} - {
        "4.jpg",
        "6.jpg",
        "broken.jpg",
    }


def test_a_file_written_just_now_gets_no_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(folder / "3.jpg", seconds=-2 * 86_400)
    _, _, record = opened(folder, b"", monkeypatch)
    assert opened(folder, record, monkeypatch)[0] == ["3.jpg", "broken.jpg"]


def test_damaged_and_foreign_records_count_as_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, record = opened(folder, b"", monkeypatch)
    whole = json.loads(record)
    other_version = json.dumps(whole | {"version": 0}).encode()
    path = next(iter(whole["files"]))
    short_entry, text_entry = (
        json.dumps(whole | {"files": whole["files"] | {path: entry}}).encode() for entry in ([1, 2], ["a"] * 10)
    )
    for content in (record[: len(record) // 2], b"\xff\x00", b"[]", b"7", other_version, short_entry, text_entry):
        decoded, _, again = opened(folder, content, monkeypatch)
        assert decoded == NAMES and again == record


def test_images_that_are_kept_are_decoded_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, record = opened(folder, b"", monkeypatch)
    decoded, splits, _ = opened(folder, record, monkeypatch, resident="host")
    assert decoded == NAMES and splits.train.resident
    kept = DecodeCache(record)
    open_splits(
        DataConfig.model_validate({"root": folder, "image_size": 8, "on_error": "skip", "resident": "host"}), kept
    )
    assert not kept.changed
