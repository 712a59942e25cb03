"""Opening of images by two processes: the work is shared, and all end as one process does."""

from __future__ import annotations

import gzip
import os
import pickle
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from containers import CONTAINERS, Item, encoded, write_folder, write_shards
from images import varied
from ranks import answers_by_rank

from scan_fast.data import DataConfig, FileSource, ImagePaths, Source, agreement, checking, open_splits
from scan_fast.data.decode import decode
from scan_fast.data.decode_cache import DecodeCache
from scan_fast.data.encoded import SETTLED_NS
from scan_fast.data.kinds import webdataset
from scan_fast.data.placement import HOST_SHARE, free_memory, kept_on_host
from scan_fast.distributed import ranks
from scan_fast.distributed.ranks import Ranks
from scan_fast.errors import DataError

pytest.importorskip("datasets")
pytest.importorskip("pyarrow")
pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")

LABELS = ("ant", "bee", "cat")
PIXELS = varied(30, 50, 40).numpy()
BROKEN = {4: b"no image at all", 17: b"nor here"}

Facts = dict[str, Any]


def items(n: int = 23, *, broken: bool = False, seed: int = 0) -> list[Item]:
    found = []
    for i in range(n):
        pixels = PIXELS[i, : 30 + (i + seed) % 20]
        data = BROKEN[i] if broken and i in BROKEN else encoded(pixels, "PNG" if i % 5 == 0 else "JPEG")
        found.append(Item(f"{i:04d}", data, LABELS[i * 3 // n], "train" if i % 3 else "test"))
    return found


def facts_of(source: Source) -> Facts:
    """Everything of a source that must not depend on the number of ranks."""
    assert source.files is not None and source.labels is not None
    return {
        "paths": source.paths,
        "labels": source.labels.tolist(),
        "classes": source.class_names,
        "size": source.size,
        "resident": source.resident,
        # Some reasons have the address of an object.
        "skipped": [(name, re.sub("0x[0-9a-f]+", "", reason)) for name, reason in source.skipped],
        "headers": [source.files.header(row) for row in range(len(source))],
        "fingerprints": agreement.digest(source.files.fingerprints.tobytes()),
        "groups": None if source.groups is None else source.groups.tolist(),
        "pixels": agreement.digest(source.read(torch.arange(len(source))).numpy().tobytes()),
    }


def opened(settings: dict[str, Any]) -> Any:
    """Open images; return the facts of both splits and the decode cache, or the text of the error."""
    cache = DecodeCache()
    try:
        splits = open_splits(DataConfig.model_validate({"image_size": 12, "workers": 2, **settings}), cache)
    except DataError as error:
        return str(error)
    assert splits.test is not None
    return facts_of(splits.train), facts_of(splits.test), cache.to_bytes()


def enter(rank: int, store: str, world: int, place: Ranks | None = None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    ranks.enter(place or Ranks(rank, world, rank, world))


def _open_on_rank(rank: int, store: str, world: int, cases: Sequence[dict[str, Any]], results: Any) -> None:
    enter(rank, store, world)
    # Several rounds, and several parts of the pixels in each.
    checking._ROUND = 2
    agreement._PART_BYTES = 3000
    decoded, listed = [], []

    def noted(image: Any, *arguments: Any, **words: Any) -> Any:
        decoded.append(1)
        return decode(image, *arguments, **words)

    list_shard = webdataset._list_shard

    def noted_shard(shard: str) -> Any:
        listed.append(os.path.basename(shard))
        return list_shard(shard)

    setattr(checking, "decode", noted)  # noqa: B010
    webdataset._list_shard = noted_shard
    answers = []
    for case in cases:
        decoded.clear()
        listed.clear()
        answers.append((opened(case), len(decoded), list(listed)))
    # A queue holds little before it is read.
    path = Path(f"{store}-{rank}")
    path.write_bytes(pickle.dumps(answers))
    results.put((rank, path))
    dist.destroy_process_group()


def on_ranks(folder: Path, cases: Sequence[dict[str, Any]]) -> list[list[tuple[Any, int, list[str]]]]:
    """Return for each case what each of two ranks has found."""
    found = answers_by_rank(_open_on_rank, folder, 2, cases, seconds=200)
    by_rank = [pickle.loads(path.read_bytes()) for _, path in found]
    return [list(pair) for pair in zip(*by_rank, strict=True)]


def test_all_ranks_end_as_one_process_does(tmp_path: Path) -> None:
    cases: list[dict[str, Any]] = []
    folder, damaged = (write_folder(tmp_path / str(broken), items(broken=broken)) for broken in (False, True))
    for resident in ("host", "files"):
        cases += [
            {"root": folder, "resident": resident},
            {"root": damaged, "resident": resident, "on_error": "skip"},
            {"root": damaged, "resident": resident},
        ]
        for kind, write in CONTAINERS.items():
            for broken in (False, True):
                source = write(tmp_path / f"{kind}-{broken}", items(broken=broken))
                cases.append({"source": source, "resident": resident, "on_error": "skip" if broken else "raise"})
    cases.append({"root": folder, "resident": "auto", "image_size": None})
    # A rank without an image in the last round, and one without a file.
    cases.append({"root": write_folder(tmp_path / "seventeen", items(17)), "resident": "host"})
    together = [item._replace(split="train") for item in items(9)]
    single = CONTAINERS["parquet"](tmp_path / "single", together)
    cases.append({"source": single, "resident": "files", "test_fraction": 0.3, "on_error": "skip"})
    for path in tmp_path.rglob("*"):  # an hour ago, so that the cache takes them
        os.utime(path, (path.stat().st_mtime - 3600,) * 2)
    time.sleep(SETTLED_NS / 1e9 + 0.1)  # this was a change, too

    for case, found in zip(cases, on_ranks(tmp_path, cases), strict=True):
        expected = opened(case)
        assert isinstance(expected, str) == ("root" in case and case.get("root") == damaged and "on_error" not in case)
        for answer, _, _ in found:
            assert answer == expected, case
        numbers = [number for _, number, _ in found]
        if case["resident"] != "files" and not isinstance(expected, str):
            train, test, _ = expected
            total = len(train["paths"]) + len(test["paths"]) + len(train["skipped"])
            assert sum(numbers) == total and max(numbers) <= total / 2 + 2
        if "webdataset" in case.get("source", ""):
            # Each tar file is listed by one rank.
            names = [name for _, _, listed in found for name in listed]
            assert len(names) == len(set(names)) > 1 and all(listed for _, _, listed in found)


def test_the_first_unusable_shard_is_named_on_all_ranks(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "shards", items(30), per_shard=5)
    shards = sorted((tmp_path / "shards").iterdir())
    for shard in shards[-2:]:
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    (found,) = on_ranks(tmp_path, [{"source": source}])
    one = opened({"source": source})
    # Training shards are listed before those of the test split.
    assert "is compressed" in one and all(answer == one for answer, _, _ in found)


def _open_own(rank: int, store: str, world: int, folders: list[Path], wanted: list[str], results: Any) -> None:
    """Open the folder of this rank, then read each image by itself."""
    enter(rank, store, world)
    answers: list[Any] = []
    try:
        source = FileSource(ImagePaths(wanted, folders[rank]), None, 12, resident=False)
        for row in range(len(source)):
            try:
                answers.append(source.read(torch.tensor([row])).numpy().tobytes())
            except DataError as error:
                answers.append(str(error))
    except DataError as error:
        answers.append(str(error))
    results.put((rank, answers))
    dist.destroy_process_group()


@pytest.fixture
def copies(tmp_path: Path) -> tuple[list[Path], list[str]]:
    """Return two equal folders whose files have other times, as on two machines, and the names of the files."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_folder(first, [item._replace(label=None, split="train") for item in items(12)])
    shutil.copytree(first, second)
    for number, path in enumerate(sorted(second.iterdir())):
        os.utime(path, (number, number))  # the first one of 1970
    return [first, second], sorted(path.name for path in first.iterdir())


def test_files_of_another_time_are_read_and_other_images_are_noticed(
    tmp_path: Path, copies: tuple[list[Path], list[str]]
) -> None:
    folders, names = copies
    one = FileSource(ImagePaths(names, folders[0]), None, 12, resident=False)
    expected = [one.read(torch.tensor([row])).numpy().tobytes() for row in range(len(one))]
    # Rank 0 has checked the first half of the rows, rank 1 the second.
    for row, same_time in ((1, True), (2, False), (9, True), (10, False)):
        first, second = (folder / names[row] for folder in folders)
        second.write_bytes(encoded(255 - PIXELS[row, :30]))
        os.utime(second, ns=(0, first.stat().st_mtime_ns if same_time else 0))
    found = answers_by_rank(_open_own, tmp_path, 2, folders, names, seconds=120)
    for (_, answers), folder, others, changed in zip(found, folders, ((9, 10), (1, 2)), ((), (9, 10)), strict=True):
        assert [row for row, answer in enumerate(answers) if isinstance(answer, str)] == list(others)
        for row in others:
            assert f"cannot read image {folder / names[row]}: OSError: the file has changed" in answers[row]
        for row in range(12):
            assert row in others or (answers[row] == expected[row]) == (row not in changed)


def test_folders_with_other_names_are_refused_on_all_ranks(
    tmp_path: Path, copies: tuple[list[Path], list[str]]
) -> None:
    folders, names = copies
    found = answers_by_rank(_open_different, tmp_path, 2, folders, names, seconds=120)
    (_, first), (_, second) = found
    assert first == second
    renamed, missing, extra, absent = first
    assert "rank 0 on " in renamed and f"has {names[5]} as number 6 of 12, rank 1" in renamed
    assert "has other.jpg as number 6 of 12; give all machines the same" in renamed
    assert f"has {names[11]} as number 12 of 12, rank 1" in missing and "has none as number 12 of 11" in missing
    assert "has none as number 12 of 11, rank 1" in extra
    assert absent.startswith("rank 1 on ") and "does not exist" in absent


def _open_different(rank: int, store: str, world: int, folders: list[Path], names: list[str], results: Any) -> None:
    enter(rank, store, world)
    changed = [*names[:5], "other.jpg", *names[6:]]
    answers = []
    for mine in ([names, changed], [names, names[:-1]], [names[:-1], names]):
        try:
            FileSource(ImagePaths(mine[rank], folders[0]), None, 12, resident=False)
        except DataError as error:
            answers.append(str(error))
    try:
        open_splits(DataConfig(root=folders[0] if rank == 0 else Path("/nowhere"), image_size=12))
    except DataError as error:
        answers.append(str(error))
    results.put((rank, answers))
    dist.destroy_process_group()


def _fetch_in_turn(rank: int, store: str, world: int, folder: Path, results: Any) -> None:
    """Ranks 0 and 2 share a machine, and rank 1 has another one."""
    enter(rank, store, world, Ranks(rank, world, rank // 2, 2 - rank % 2))
    order = folder / "order"

    def fetch() -> bool:
        fetched = not order.exists()
        with order.open("a") as file:
            file.write(f"{rank} ")
        return fetched

    def fails() -> None:
        if rank == 1:
            raise DataError("no such file")
        with (folder / "before").open("a") as file:
            file.write(f"{rank} ")

    fetched = agreement.in_turn(fetch)
    try:
        agreement.in_turn(fails)
        problem = ""
    except DataError as error:
        problem = str(error)
    results.put((rank, fetched, problem))
    dist.destroy_process_group()


def test_files_are_fetched_by_one_process_and_an_error_ends_all(tmp_path: Path) -> None:
    found = answers_by_rank(_fetch_in_turn, tmp_path, 3, tmp_path, seconds=120)
    assert found == [(rank, rank == 0, "no such file") for rank in range(3)]
    assert (tmp_path / "order").read_text() == "0 1 2 "
    assert (tmp_path / "before").read_text() == "0 "


def test_processes_of_a_machine_share_its_memory() -> None:
    part = int(HOST_SHARE * free_memory() / 2)
    assert kept_on_host("auto", part)
    ranks.enter(Ranks(0, 4, 0, 4))
    try:
        assert not kept_on_host("auto", part) and kept_on_host("auto", part // 3) and kept_on_host("host", part)
    finally:
        ranks.enter(Ranks())
