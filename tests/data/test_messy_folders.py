"""Unusual folders: names, links, permissions, and files that are not images in spite of their suffix."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from images import varied
from PIL import Image

from scan_fast.data import DataConfig, open_splits
from scan_fast.data.datasets import Splits
from scan_fast.data.folders import find_images
from scan_fast.errors import DataError


def image(path: Path, number: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(varied(number + 1, 9, 9)[number].numpy()).save(path, "PNG")
    return path


def opened(root: Path, **options: object) -> Splits:
    return open_splits(DataConfig.model_validate({"root": root, "image_size": 8, **options}))


def paths_of(root: Path, **options: object) -> list[str]:
    return sorted(opened(root, **options).train.paths)


STRANGE = [
    b"caf\xe9.png",  # Latin-1, no UTF-8
    "naïve 图片.png".encode(),
    b"two\nlines.png",
    b'a,"b".png',
    b" leading and trailing .png",
    b"-rf.png",
    b"%s{0}$HOME.png",
    b".png.png"[1:],
    b"x" * 250 + b".png",
]


@pytest.mark.parametrize("resident", ["host", "files"])
def test_images_with_strange_names_are_read(tmp_path: Path, resident: str) -> None:
    source = image(tmp_path / "plain.png", 3)
    for name in STRANGE:
        (tmp_path / os.fsdecode(name)).write_bytes(source.read_bytes())
    splits = opened(tmp_path, resident=resident, test_fraction=0.1)
    assert splits.test is not None
    names = [*splits.train.paths, *splits.test.paths]
    assert sorted(os.fsencode(name) for name in names) == sorted([b"plain.png", *STRANGE])
    for part in (splits.train, splits.test):
        pixels = part.read(torch.arange(len(part)))
        assert torch.equal(pixels, pixels[:1].expand_as(pixels)) and int(pixels.max()) > 0


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    image(elsewhere / "far.png")
    image(elsewhere / "deep" / "er.png")
    root = tmp_path / "root"
    image(root / "a" / "near.png")
    (root / "a" / "file-link.png").symlink_to(elsewhere / "far.png")
    (root / "b").symlink_to(elsewhere)
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (elsewhere / "deep" / "back").symlink_to(root)
    found, problems = find_images(root)
    assert found == ["a/file-link.png", "a/near.png", "b/deep/er.png", "b/far.png"]
    assert problems == []


def test_what_cannot_be_listed_is_named_or_skipped(tmp_path: Path) -> None:
    for number in range(6):
        image(tmp_path / f"{number}.png", number)
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "circle.png").symlink_to(tmp_path / "circle.png")
    (tmp_path / "gone-folder").symlink_to(tmp_path / "nowhere")  # no image by its name
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    image(tmp_path / "folder.png" / "inside.png")
    with pytest.raises(DataError, match=r"cannot read image .*broken\.png: FileNotFoundError.*data\.on_error=skip"):
        opened(tmp_path)
    splits = opened(tmp_path, on_error="skip")
    assert sorted(splits.train.paths) == [
        *(f"{i}.png" for i in range(6)),
        "folder.png/inside.png",
    ]
    listed = dict(splits.train.skipped)
    assert sorted(listed) == ["broken.png", "circle.png", "pipe.png"]
    assert listed["pipe.png"] == "it is neither a file nor a folder"


def test_files_that_are_no_images_in_spite_of_their_names(tmp_path: Path) -> None:
    for number in range(20):
        image(tmp_path / f"{number}.png", number)
    wrong = {
        "empty.jpg": b"",
        "page.jpg": b"<!doctype html><title>404 Not Found</title>",
        "cut.png": (tmp_path / "1.png").read_bytes()[:60],
        "zeros.gif": bytes(1000),
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    }
    for name, content in wrong.items():
        (tmp_path / name).write_bytes(content)
    # The suffix may be wrong if the content is an image.
    image(tmp_path / "really-a-png.jpg")
    for resident in ("host", "files"):
        splits = opened(tmp_path, on_error="skip", resident=resident)
        assert len(splits.train) == 21
        listed = dict(splits.train.skipped)
        assert sorted(listed) == sorted(wrong) and all(listed.values())


def test_hidden_files_and_other_files_do_not_count(tmp_path: Path) -> None:
    image(tmp_path / "a.png")
    image(tmp_path / "b.png")
    for name in (".DS_Store", "Thumbs.db", "notes.txt", "no-suffix", "movie.mp4", "raw.cr2"):
        (tmp_path / name).write_bytes(b"x")
    image(tmp_path / "._a.png")
    image(tmp_path / ".git" / "c.png")
    image(tmp_path / "__MACOSX" / "._b.png")
    assert paths_of(tmp_path) == ["a.png", "b.png"]


def test_folders_may_nest_deeper_than_calls(tmp_path: Path) -> None:
    image(tmp_path / "top.png")
    here = os.open(tmp_path, os.O_RDONLY)
    try:
        for _ in range(1200):
            os.mkdir("d", dir_fd=here)
            deeper = os.open("d", os.O_RDONLY, dir_fd=here)
            os.close(here)
            here = deeper
        with os.fdopen(os.open("deep.png", os.O_WRONLY | os.O_CREAT, dir_fd=here), "wb") as file:
            file.write((tmp_path / "top.png").read_bytes())
        found, problems = find_images(tmp_path)
    finally:
        os.close(here)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # Python's own removal is recursive
    assert sorted(map(len, found)) == [len("top.png"), 2 * 1200 + len("deep.png")] and not problems


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs the rights of Unix")
def test_files_and_folders_that_may_not_be_read() -> None:
    """Run as another user than root, who may read everything."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        for name in ("a.png", "b.png", "c.png", "secret.png", "closed/d.png"):
            image(root / name)
        (root / "secret.png").chmod(0)
        (root / "closed").chmod(0)
        script = (
            "import os, sys\n"
            "from scan_fast.data import DataConfig, open_splits\n"
            "import PIL.PngImagePlugin\n"
            "if os.geteuid() == 0: os.seteuid(65534)\n"
            "splits = open_splits(DataConfig(root=sys.argv[1], image_size=8, on_error='skip'))\n"
            "for path, reason in sorted(splits.train.skipped): print(path, reason)\n"
            "print(len(splits.train))\n"
        )
        done = subprocess.run([sys.executable, "-c", script, folder], capture_output=True, text=True, check=False)
        (root / "closed").chmod(stat.S_IRWXU)
    assert done.returncode == 0, done.stderr
    closed, secret, count = done.stdout.splitlines()
    assert closed.startswith("closed/ PermissionError") and secret.startswith("secret.png PermissionError")
    assert count == "3"
