"""Containers that change under a run, and their labels: noticed in training, at the next start, and by the cache."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from containers import Item, encoded, write_parquet, write_shards
from driving import TINY_FOLDER, picture, run_here

from scan_fast.data import DataConfig, open_splits
from scan_fast.data.decode_cache import DecodeCache
from scan_fast.errors import DataError

parquet = pytest.importorskip("pyarrow.parquet")


def items(order: list[int], labels: str = "") -> list[Item]:
    images = [encoded(np.asarray(picture(i)), "PNG") for i in order]
    return [Item(f"{i:03d}", data, labels[i] if labels else None, suffix="png") for i, data in enumerate(images)]


def test_a_tar_file_that_changes_in_training(tmp_path: Path) -> None:
    source = write_shards(tmp_path, items(list(range(7))))
    (shard,) = tmp_path.iterdir()
    train = open_splits(DataConfig(source=source, image_size=16, resident="files")).train
    before = train.read(torch.arange(7))
    os.utime(shard, ns=(7, 7))  # only touched
    assert torch.equal(train.read(torch.arange(7)), before)
    data, name = shard.read_bytes(), b"003.png"
    offset = data.index(name) + 512 + 20  # in the pixels of this member
    shard.write_bytes(data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :])
    os.utime(shard, ns=(7, 7))
    others = torch.tensor([0, 1, 2, 4, 5, 6])
    assert torch.equal(train.read(others), before[others])
    with pytest.raises(DataError, match=r"003\.png: OSError: the file has changed"):
        train.read(torch.tensor([3]))


def test_rows_that_name_files_are_known_by_these(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scan_fast.data.encoded.SETTLED_NS", 0)
    import pyarrow as pa

    for number in range(4):
        picture(number).convert("L").save(tmp_path / f"{number}.bmp")
        os.utime(tmp_path / f"{number}.bmp", ns=(10**18, 10**18))
    buffer = io.BytesIO()
    picture(9).save(buffer, "PNG")
    rows: list[dict[str, bytes | str | None]] = [{"bytes": None, "path": f"{number}.bmp"} for number in range(4)]
    rows.append({"bytes": buffer.getvalue(), "path": "9.png"})
    parquet.write_table(pa.table({"image": rows}), tmp_path / "images.parquet")
    config = DataConfig(source=f"parquet:{tmp_path}", image_size=16, resident="files", on_error="skip")
    cache = DecodeCache()
    before = open_splits(config, cache).train.files
    assert before is not None
    (tmp_path / "1.bmp").rename(tmp_path / "aside")
    (tmp_path / "2.bmp").rename(tmp_path / "1.bmp")
    (tmp_path / "aside").rename(tmp_path / "2.bmp")
    after = open_splits(config, DecodeCache(cache.to_bytes())).train.files
    assert after is not None
    swapped = before.fingerprints[[0, 2, 1, 3, 4]]
    assert after.fingerprints.tolist() == swapped.tolist() != before.fingerprints.tolist()


def test_labels_that_change_between_stages(tmp_path: Path) -> None:
    box, order = tmp_path / "box", list(range(24))
    source = write_parquet(box, items(order, "abc" * 8))
    words = (*TINY_FOLDER, "--quiet", "--clusters", "3", "--out", tmp_path / "out")
    assert run_here("pretext", "--data", source, *words).code == 0
    write_parquet(box, items(order, "abcb" + "bca" + "abc" * 5 + "ab"))
    message = run_here("mine", tmp_path / "out", "--quiet").refusal()
    assert "holds a run on other labels: " in message and "row 3 was of class a and is of class b now" in message
    write_parquet(box, items(order, "abd" * 8))
    message = run_here("mine", tmp_path / "out", "--quiet").refusal()
    assert "class 2 was c and is d now. Undo this, and the same command continues" in message
    write_parquet(box, items(order, "abc" * 8))
    assert run_here("mine", tmp_path / "out", "--quiet").code == 0
