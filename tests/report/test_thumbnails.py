"""Thumbnails: which images get one, what is written, and what later reports use again."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from report_runs import file_source, photograph

from scan_fast.data.sources import SubsetSource, TensorSource
from scan_fast.report.originals import Originals
from scan_fast.report.thumbnails import SIDE, choose, data_urls, encode, write_thumbnails
from scan_fast.runs.tables import Assignments


def table_of(clusters: list[int], confidence: list[float] | None = None, paths: list[str] | None = None) -> Assignments:
    n = len(clusters)
    known = np.array(confidence if confidence is not None else [0.5] * n)
    names = paths if paths is not None else [f"{i}" for i in range(n)]
    return Assignments(names, np.array(clusters, dtype=np.int64), known, known, ["train"] * n, None)


def test_all_images_are_chosen_if_there_is_room() -> None:
    assert choose(table_of([0, 1, 1]), 3).tolist() == [0, 1, 2]


def test_small_groups_are_taken_whole_and_large_ones_share_the_rest() -> None:
    table = table_of([0] * 100 + [1] * 4 + [2] * 60, list(np.linspace(0, 1, 164)))
    chosen = choose(table, 34)
    counts = np.bincount(table.clusters[chosen])
    assert counts.tolist() == [15, 4, 15]
    # At even steps of confidence, the most confident first and the least confident last.
    assert {0, 99, 104, 163} <= set(chosen.tolist())
    steps = np.diff(chosen[chosen < 100])
    assert steps.min() >= 6 and steps.max() <= 8


def test_what_must_be_shown_is_chosen_first() -> None:
    table = table_of([0] * 50 + [1] * 50)
    chosen = choose(table, 10, [77, 3, 77, 78])
    assert {3, 77, 78} <= set(chosen.tolist()) and len(chosen) == 10
    assert choose(table, 2, [77, 3, 78]).tolist() in ([3, 77], [3, 78])
    assert choose(table, 0).tolist() == []


@pytest.fixture
def photos(tmp_path: Path) -> tuple[Path, list[str]]:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    photograph(0, (640, 480)).save(folder / "wide.jpg")
    photograph(1, (300, 900)).save(folder / "sub" / "tall.png")
    photograph(2, (40, 30)).save(folder / "tiny.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph(3, (640, 480)).save(folder / "turned.jpg", exif=exif)
    return folder, ["wide.jpg", "sub/tall.png", "tiny.png", "turned.jpg"]


def test_thumbnails_show_the_whole_upright_original(photos: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, names = photos
    originals = Originals({"train": file_source(folder, names)}, table_of([0] * 4, paths=names))
    found = write_thumbnails(tmp_path / "thumbnails", originals, range(4))
    sizes = []
    for i in range(4):
        with Image.open(tmp_path / "thumbnails" / found[i]) as picture:
            sizes.append(picture.size)
    assert sizes == [(SIDE, 144), (64, SIDE), (40, 30), (144, SIDE)]
    assert [Path(found[i]).suffix for i in range(4)] == [".jpg", ".jpg", ".png", ".jpg"]
    with Image.open(tmp_path / "thumbnails" / found[0]) as picture:
        expected = np.asarray(photograph(0, (640, 480)).resize((SIDE, 144), Image.Resampling.BOX), dtype=float)
        assert np.abs(np.asarray(picture, dtype=float) - expected).mean() < 8
    assert [originals.size(i) for i in range(4)] == [(640, 480), (300, 900), (40, 30), (480, 640)]


def test_thumbnails_are_used_again_until_the_image_changes(photos: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, names = photos
    out = tmp_path / "thumbnails"

    def write(numbers: list[int]) -> dict[int, str]:
        return write_thumbnails(
            out, Originals({"train": file_source(folder, names)}, table_of([0] * 4, paths=names)), numbers
        )

    first = write([0, 1, 2])
    marked = out / first[1]
    content = encode(Image.new("RGB", (64, 192), (1, 2, 3)))
    marked.write_bytes(content)
    (out / first[0]).write_bytes(b"")  # as a crash may leave it
    photograph(9, (50, 50)).save(folder / "tiny.png")
    os.utime(folder / "tiny.png", ns=(1, 1))
    second = write([0, 1, 2])
    assert second[1] == first[1] and marked.read_bytes() == content
    assert (out / second[0]).stat().st_size > 1000
    assert second[2] != first[2] and not (out / first[2]).exists()
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.*") if p.is_file()} == set(second.values())
    # A page of one file takes what is there and writes nothing.
    originals = Originals({"train": file_source(folder, names)}, table_of([0] * 4, paths=names))
    urls = data_urls(out, originals, [1, 3])
    assert len(urls[1]) < 2000 < len(urls[3])
    assert {p.relative_to(out).as_posix() for p in out.rglob("*.*") if p.is_file()} == set(second.values())


def test_lost_and_damaged_images_have_none(photos: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, names = photos
    source = file_source(folder, names)
    (folder / "wide.jpg").unlink()
    (folder / "turned.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:3000])
    originals = Originals({"train": source}, table_of([0] * 5, paths=[*names, "another.jpg"]))
    assert originals.lost == 1
    assert set(write_thumbnails(tmp_path / "thumbnails", originals, range(5))) == {1, 2}
    assert originals.file(0) is None and originals.file(4) is None and originals.file(3) is not None
    with pytest.raises(OSError):
        originals.content(4)


def test_images_in_memory_are_known_by_their_pixels(tmp_path: Path) -> None:
    images = torch.zeros((3, 64, 64, 3), dtype=torch.uint8)
    images[2] = 200
    source = SubsetSource(TensorSource(images), torch.tensor([2, 0, 1]))
    originals = Originals({"train": source}, table_of([0] * 3, paths=source.paths))
    found = write_thumbnails(tmp_path, originals, range(3))
    assert found[1] == found[2] != found[0]
    with Image.open(io.BytesIO(originals.content(0))) as picture:
        assert picture.size == (64, 64) and picture.getpixel((5, 5)) == (200, 200, 200)
    assert originals.digest(1) == originals.digest(2) != originals.digest(0)
