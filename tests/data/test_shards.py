"""Shards of containers: which image is in which, how often they are read, and the setting that keeps them together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from containers import Item, encoded, write_folder, write_huggingface, write_parquet, write_shards
from images import varied

from scan_fast.data import DataConfig, SubsetSource, open_splits
from scan_fast.data.datasets import split_source
from scan_fast.data.kinds import parquet
from scan_fast.data.order import epoch_order
from scan_fast.errors import DataError
from scan_fast.random import permutation, stream_key

pytest.importorskip("datasets")
pytest.importorskip("pyarrow")

PIXELS = varied(80, 12, 12).numpy()


def items(n: int = 20, broken: tuple[int, ...] = ()) -> list[Item]:
    return [Item(f"{i:04d}", b"nothing" if i in broken else encoded(PIXELS[i]), "ab"[i % 2]) for i in range(n)]


def opened(source: str, **options: Any) -> Any:
    return open_splits(DataConfig.model_validate({"source": source, "image_size": 8, **options})).train


@pytest.mark.parametrize("resident", ["host", "files"])
def test_each_image_knows_its_shard(tmp_path: Path, resident: str) -> None:
    tar = opened(write_shards(tmp_path / "tar", items(broken=(3,))), resident=resident, on_error="skip")
    by_shard = [0] * 6 + [1] * 7 + [2] * 6
    assert tar.groups.dtype == torch.int64 and tar.groups.tolist() == by_shard
    # Files of 11 rows, in row groups of four.
    rows = opened(write_parquet(tmp_path / "parquet", items()), resident=resident)
    assert rows.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 4 + [4] * 4 + [5]
    chosen = torch.tensor([18, 0, 7])
    assert SubsetSource(tar, chosen).groups.tolist() == [2, 0, 1]  # type: ignore[union-attr]
    limited = opened(f"webdataset:{tmp_path / 'tar'}", resident=resident, on_error="skip", limit=5)
    assert limited.groups.tolist() == [by_shard[tar.paths.index(path)] for path in limited.paths]
    assert opened("folder", root=write_folder(tmp_path / "folder", items()), resident=resident).groups is None
    assert opened(write_huggingface(tmp_path / "hf", items()), resident=resident).groups is None
    assert opened("digits").groups is None


def test_shards_are_kept_together_only_if_there_are_some(tmp_path: Path) -> None:
    assert opened(write_shards(tmp_path / "tar", items()), shuffle="shards").groups is not None
    folder = write_folder(tmp_path / "folder", items())
    message = r"data\.shuffle=shards is for images in tar files .*, which {} does not have; set data\.shuffle=images"
    with pytest.raises(DataError, match=message.format("folder")):
        opened("folder", root=folder, shuffle="shards")
    with pytest.raises(DataError, match=message.format("digits")):
        opened("digits", shuffle="shards")
    with pytest.raises(DataError, match=message.format("folder")):
        split_source(opened("folder", root=folder), DataConfig(shuffle="shards"))


def test_an_epoch_by_shards_reads_each_row_group_about_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet

    monkeypatch.setattr(parquet, "_KEPT_SHARE", 0)  # so that eight row groups are kept
    source = opened(write_parquet(tmp_path / "parquet", items(80), per_file=20), resident="files", workers=1)
    groups = 20
    assert len(source.groups.unique()) == groups
    read = []

    class Reader(pyarrow.parquet.ParquetFile):
        def iter_batches(self, *, row_groups: list[int], **options: Any) -> Any:
            read.extend(row_groups)
            return super().iter_batches(row_groups=row_groups, **options)

    monkeypatch.setattr(source.files.images._parquet, "ParquetFile", Reader)
    key = stream_key(0, "pretext")
    counts = []
    for order in (epoch_order(key, 0, source.groups, 8, lanes=2, window=2), permutation(key, 0, 80)):
        read.clear()
        pixels = torch.cat([source.read(batch) for batch in order.split(8)])
        counts.append(len(read))
        assert torch.equal(pixels[order.argsort()], source.read(torch.arange(80)))
    assert groups - 8 <= counts[0] <= groups + 1 and counts[1] > 2 * groups


def test_row_groups_are_kept_if_memory_allows(tmp_path: Path) -> None:
    source = opened(write_parquet(tmp_path / "parquet", items(80), per_file=20), resident="files", workers=1)
    images = source.files.images
    source.read(torch.arange(80))
    assert list(images._kept) == list(range(20)) and images._held == sum(images._bytes)
    images._limit = images._held - 1
    images._kept.clear()
    images._held = 0
    source.read(torch.arange(80))
    assert list(images._kept) == list(range(1, 20)) and images._held == sum(images._bytes[1:])
