"""Folders of groups: links or copies under safe names, and nothing that was there before is touched."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from driving import run_here
from report_runs import file_source, photograph, write_run

from scan_fast.data.sources import Source, TensorSource
from scan_fast.errors import UsageError
from scan_fast.report.folders import MARKER, folder_names, write_folders
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.names import GroupNames

NAMES = ["a/x.jpg", "b/x.jpg", "b/X.JPG", "c.png", "odd #1 & 100%.jpg", "line\nbreak.jpg"]


@pytest.fixture
def case(tmp_path: Path) -> tuple[RunFolder, Path, dict[str, Source]]:
    """A run of six files in two groups."""
    images = tmp_path / "images"
    for number, name in enumerate(NAMES):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        photograph(number, (64, 48)).save(images / name)
    write_run(tmp_path / "run", [(name, "train", 0 if i < 4 else 2, "0.9", "0.8") for i, name in enumerate(NAMES)])
    return RunFolder(tmp_path / "run"), images, {"train": file_source(images, NAMES)}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("how", ["link", "copy"])
def test_each_group_has_a_folder(how: str, case: tuple[RunFolder, Path, dict[str, Source]], tmp_path: Path) -> None:
    run, images, sources = case
    before = snapshot(images)
    out = tmp_path / "sorted"
    counts = write_folders(run, sources, out, how)  # type: ignore[arg-type]
    assert counts == {"group-00": 4, "group-02": 2}
    assert sorted(p.name for p in out.iterdir()) == [MARKER, "group-00", "group-02"]
    # Names that differ in case alone are one name for some file systems.
    assert sorted(p.name for p in (out / "group-00").iterdir()) == ["X-3.JPG", "c.png", "x-2.jpg", "x.jpg"]
    origin = {"x.jpg": "a/x.jpg", "x-2.jpg": "b/x.jpg", "X-3.JPG": "b/X.JPG", "c.png": "c.png"}
    for name, source in origin.items():
        path = out / "group-00" / name
        assert path.read_bytes() == (images / source).read_bytes()
        assert path.is_symlink() == (how == "link")
        assert how == "copy" or os.path.samefile(path, images / source)
    assert snapshot(images) == before


def test_names_of_groups_are_names_of_folders(case: tuple[RunFolder, Path, dict[str, Source]], tmp_path: Path) -> None:
    run, _, sources = case
    table = run.read(artifacts.ASSIGNMENTS)
    run.write(artifacts.NAMES, GroupNames(table.digest, {0: "red: shoes/boots", 2: "RED_ SHOES_BOOTS"}))
    assert write_folders(run, sources, tmp_path / "out") == {"red_ shoes_boots": 4, "RED_ SHOES_BOOTS-2": 2}


@pytest.mark.parametrize(
    ("name", "folder"),
    [("..", "_"), ("a/../b", "a_.._b"), ("CON", "_CON"), ("x. ", "x"), ("ünï 7", "ünï 7"), ("a" * 99, "a" * 60)],
)
def test_folders_have_safe_names(name: str, folder: str) -> None:
    assert folder_names(2, {0: name}) == [folder, "group-01"]


def test_the_same_command_goes_on_where_it_stopped(
    case: tuple[RunFolder, Path, dict[str, Source]], tmp_path: Path
) -> None:
    run, _, sources = case
    out = tmp_path / "out"
    write_folders(run, sources, out, "copy")
    (out / "group-00" / "c.png").unlink()
    (out / "group-00" / "x.jpg").write_bytes(b"edited")
    (out / "group-02" / "my own.txt").write_text("note")
    write_folders(run, sources, out, "copy")
    assert (out / "group-00" / "c.png").exists()
    assert (out / "group-00" / "x.jpg").read_bytes() == b"edited"
    assert (out / "group-02" / "my own.txt").exists()


def test_folders_of_others_are_refused(case: tuple[RunFolder, Path, dict[str, Source]], tmp_path: Path) -> None:
    run, images, sources = case
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("text")
    with pytest.raises(UsageError, match="is not empty; choose a new folder"):
        write_folders(run, sources, out)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="is a file; choose a new folder"):
        write_folders(run, sources, out / "thesis.txt")
    for inside in (images, images / "sorted", images / "a" / ".." / "sorted"):
        with pytest.raises(UsageError, match="lies in the folder of the images"):
            write_folders(run, sources, inside)
    (tmp_path / "door").symlink_to(images)
    with pytest.raises(UsageError, match="lies in the folder of the images"):
        write_folders(run, sources, tmp_path / "door" / "new")
    assert not (images / "sorted").exists()
    write_folders(run, sources, tmp_path / "mine")
    with pytest.raises(UsageError, match="holds another grouping, other names, or copies"):
        write_folders(run, sources, tmp_path / "mine", "copy")
    (tmp_path / "mine" / MARKER).write_text("{")
    with pytest.raises(UsageError, match="holds another grouping"):
        write_folders(run, sources, tmp_path / "mine")


def test_hard_links_and_copies_take_the_place_of_symbolic_links(
    case: tuple[RunFolder, Path, dict[str, Source]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, images, sources = case

    def refuse(*_: object) -> None:
        raise OSError("this file system has none")

    monkeypatch.setattr(os, "symlink", refuse)
    write_folders(run, sources, tmp_path / "hard")
    assert os.path.samefile(tmp_path / "hard/group-00/c.png", images / "c.png")
    assert not (tmp_path / "hard/group-00/c.png").is_symlink()
    monkeypatch.setattr(os, "link", refuse)
    write_folders(run, sources, tmp_path / "copies")
    copied = tmp_path / "copies/group-00/c.png"
    assert copied.read_bytes() == (images / "c.png").read_bytes() and not os.path.samefile(copied, images / "c.png")


def test_images_in_memory_become_files(tmp_path: Path) -> None:
    rows = [("digits/1", "train", 0, "0.9", "0.8"), ("digits/2", "train", 1, "0.9", "0.8")]
    write_run(tmp_path / "run", rows, n_clusters=2)
    source = TensorSource(torch.full((2, 8, 8), 77, dtype=torch.uint8), paths=["digits/1", "digits/2"])
    write_folders(RunFolder(tmp_path / "run"), {"train": source}, tmp_path / "out")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")) == [
        "group-00/1.png",
        "group-01/2.png",
    ]


def test_images_of_a_container_become_files_by_the_command(tmp_path: Path) -> None:
    contents = {}
    with tarfile.open(tmp_path / "shard-000.tar", "w") as archive:
        for number in range(6):
            buffer = io.BytesIO()
            photograph(number, (40, 40)).save(buffer, "JPEG")
            contents[f"k{number}"] = buffer.getvalue()
            member = tarfile.TarInfo(f"k{number}.jpg")
            member.size = len(buffer.getvalue())
            archive.addfile(member, io.BytesIO(buffer.getvalue()))
    from scan_fast.data.config import DataConfig
    from scan_fast.data.datasets import open_splits

    spec = f"webdataset:{tmp_path / 'shard-000.tar'}"
    splits = open_splits(DataConfig(source=spec, image_size=16, test_fraction=0.5))
    assert splits.test is not None
    rows = [
        (path, split, 1, "0.9", "0.8")
        for split, source in (("train", splits.train), ("test", splits.test))
        for path in source.paths
    ]
    write_run(
        tmp_path / "run",
        rows,
        n_clusters=2,
        settings=f"data: {json.dumps({'source': spec, 'image_size': 16, 'test_fraction': 0.5})}\n",
    )
    result = run_here("folders", tmp_path / "run", "--out", tmp_path / "out")
    assert result.code == 0, result.err
    assert result.out.split() == ["6", str(tmp_path / "out" / "group-01")]
    found = sorted(path.read_bytes() for path in (tmp_path / "out" / "group-01").iterdir())
    assert found == sorted(contents.values())
    assert all(path.suffix == ".jpg" for path in (tmp_path / "out" / "group-01").iterdir())
