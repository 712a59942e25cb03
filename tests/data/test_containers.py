"""Images in containers: the same pixels, labels, splits and errors as from files of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from containers import CONTAINERS, Item, encoded, write_folder
from images import varied

from scan_fast.data import DataConfig, Splits, checking, open_splits, source_from
from scan_fast.data.decode import decode
from scan_fast.data.decode_cache import DecodeCache
from scan_fast.errors import DataError, MissingPackageError

pytest.importorskip("datasets")
pytest.importorskip("pyarrow")

LABELS = ("ant", "bee", "cat")
PIXELS = varied(40, 80, 70).numpy()


def items(n: int = 30, *, labelled: bool = True, split: Callable[[int], str] = lambda i: "train") -> list[Item]:
    """Photographs and PNG files of several sizes, in an order that files and keys share."""
    found = []
    for i in range(n):
        pixels = PIXELS[i, : 40 + i]
        png = i % 5 == 0
        label = LABELS[i * len(LABELS) // n] if labelled else None
        data = encoded(pixels, "PNG" if png else "JPEG")
        found.append(Item(f"{i:04d}", data, label, split(i), "png" if png else "jpg"))
    return found


def opened(source: str, cache: DecodeCache | None = None, **options: object) -> Splits:
    return open_splits(DataConfig.model_validate({"source": source, "image_size": 24, **options}), cache)


def half(i: int) -> str:
    return "train" if i % 3 else "test"


@pytest.fixture(params=list(CONTAINERS))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("options", [{}, {"resident": "files"}, {"decode": "scaled", "workers": 1}])
def test_pixels_labels_and_splits_are_those_of_a_folder(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    everything = items(split=half)
    folder = opened("folder", root=write_folder(tmp_path / "folder", everything), **options)
    splits = opened(CONTAINERS[kind](tmp_path / "container", everything), **options)
    assert splits.test is not None and folder.test is not None
    for ours, theirs in ((splits.train, folder.train), (splits.test, folder.test)):
        assert len(ours) == len(theirs) > 5 and ours.resident == theirs.resident
        order = torch.arange(len(ours)).flip(0)
        assert torch.equal(ours.read(order), theirs.read(order))
        assert ours.labels is not None and theirs.labels is not None
        assert ours.labels.tolist() == theirs.labels.tolist() and ours.class_names == theirs.class_names == list(LABELS)
        assert len(set(ours.paths)) == len(ours)
        assert ours.files is not None and theirs.files is not None
        some = torch.tensor([3, 0])
        for one, other in zip(ours.files.encoded(some), theirs.files.encoded(some), strict=True):
            assert np.array_equal(one, other) and one.flags.writeable
        boxes = [torch.tensor([[2, 3, 9, 8], [0, 0, 24, 24]])]
        assert torch.equal(ours.files.cut(some, 24, boxes, [12])[0], theirs.files.cut(some, 24, boxes, [12])[0])
    assert (splits.mean, splits.std) == (folder.mean, folder.std)


def test_a_part_is_held_out_only_on_request(tmp_path: Path, kind: str) -> None:
    source = CONTAINERS[kind](tmp_path / "container", items(40))
    whole = opened(source)
    assert whole.test is None and len(whole.train) == 40
    splits, again = opened(source, test_fraction=0.3), opened(source, test_fraction=0.3)
    assert splits.test is not None and again.test is not None
    assert len(splits.train) + len(splits.test) == 40 and 3 < len(splits.test) < 25
    assert set(splits.train.paths).isdisjoint(splits.test.paths)
    assert again.test.paths == splits.test.paths
    everything = source_from(source, DataConfig(image_size=24))
    assert sorted(everything.paths) == sorted([*splits.train.paths, *splits.test.paths])
    assert everything.labels is not None and everything.class_names == list(LABELS)


def test_images_without_labels(tmp_path: Path, kind: str) -> None:
    unlabelled = opened(CONTAINERS[kind](tmp_path / "a", items(12, labelled=False)))
    assert unlabelled.train.labels is None and unlabelled.train.class_names is None
    ignored = opened(CONTAINERS[kind](tmp_path / "b", items(12)), labels="none")
    assert ignored.train.labels is None and ignored.train.class_names is None


LOCATIONS = {
    "webdataset": r"container/train-000\.tar: 0004\.jpg",
    "parquet": r"container/train-00000\.parquet row 4",
    "hf": r"container/train row 4",
}


@pytest.mark.parametrize("resident", ["host", "files"])
def test_unreadable_images_are_named_or_skipped(tmp_path: Path, kind: str, resident: str) -> None:
    everything = items(20)
    broken = {4: b"no image at all", 8: everything[8].data[:-40], 13: b""}
    for i, data in broken.items():
        everything[i] = everything[i]._replace(data=data)
    source = CONTAINERS[kind](tmp_path / "container", everything)
    with pytest.raises(DataError, match=rf"cannot read image .*{LOCATIONS[kind]}: .*data\.on_error=skip"):
        opened(source, resident=resident, workers=1, test_fraction=0.01)
    splits = opened(source, resident=resident, on_error="skip")
    assert len(splits.train) == 17 and splits.test is None
    skipped = dict(splits.train.skipped)
    assert len(skipped) == 3 and all(skipped.values())
    pixels = splits.train.read(torch.arange(17))
    good = [item for i, item in enumerate(everything) if i not in broken]
    expected = source_from(write_folder(tmp_path / "folder", good), DataConfig(image_size=24))
    everyone = expected.read(torch.arange(len(expected)))
    assert sorted(map(bytes, pixels.numpy())) == sorted(map(bytes, everyone.numpy()))


def test_the_decode_cache_spares_a_second_decoding(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scan_fast.data.encoded.SETTLED_NS", 0)
    source = CONTAINERS[kind](tmp_path / "container", items(10))
    count = [0]

    def counted(*arguments: Any, **words: Any) -> Any:
        count[0] += 1
        return decode(*arguments, **words)

    monkeypatch.setattr(checking, "decode", counted)
    first = DecodeCache()
    opened(source, first, on_error="skip", resident="files")
    assert count[0] == len(json.loads(first.to_bytes())["files"]) == 10
    second = DecodeCache(first.to_bytes())
    opened(source, second, on_error="skip", resident="files")
    assert count[0] == 10 and not second.changed
    for path in (tmp_path / "container").rglob("*"):
        os.utime(path, ns=(10**18 + 1, 10**18 + 1))
    opened(source, DecodeCache(first.to_bytes()), on_error="skip", resident="files")
    assert count[0] == 20


def test_default_size_follows_the_images(tmp_path: Path, kind: str) -> None:
    source = CONTAINERS[kind](tmp_path / "container", items(6))
    assert open_splits(DataConfig(source=source)).train.size == 64


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("cifar1", r"'cifar1' is no image source; known are digits, .*webdataset:SHARDS.*did you mean cifar10\?"),
        ("wedataset:x.tar", r"did you mean webdataset:SHARDS\?"),
        ("parquet", r"the source parquet needs an argument: parquet:GLOB, got 'parquet'"),
        ("hf:", r"needs an argument: hf:DATASET"),
        ("digits:8", r"the source digits takes no argument, got 'digits:8'"),
    ],
)
def test_sources_are_checked_with_the_configuration(source: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(source=source)


def test_one_image_cannot_be_split(tmp_path: Path, kind: str) -> None:
    source = CONTAINERS[kind](tmp_path / "container", items(1))
    assert len(opened(source).train) == 1
    with pytest.raises(DataError, match=r"holds images out, but there is only .*; add images, or set data"):
        opened(source, test_fraction=0.1)


@pytest.mark.parametrize(("source", "extra"), [("hf:x", "hf"), ("parquet:{}", "parquet")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, extra: str) -> None:
    (tmp_path / "x.parquet").write_bytes(b"")
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(MissingPackageError, match=rf"pip install 'scan-fast\[{extra}\]'"):
        opened(source.format(tmp_path))


def test_dali_decodes_from_containers(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("nvidia.dali")
    from scan_fast.views import dali_graphs
    from scan_fast.views.decode_dali import DaliDecoder

    decoder = DaliDecoder(dali_graphs, torch.device("cpu"))
    config = DataConfig(image_size=24, resident="files")
    found = []
    for source in (CONTAINERS[kind](tmp_path / "container", items(12)), write_folder(tmp_path / "folder", items(12))):
        images = source_from(source, config).files
        assert images is not None
        found.append(decoder.cut(images, torch.arange(12), 24, [torch.tensor([[1, 2, 20, 18]]).expand(12, 4)], [16])[0])
    assert torch.equal(*found)
