"""Tiny-ImageNet on files that the tests write: both layouts, the archive, names of classes, and what is refused."""

from __future__ import annotations

import hashlib
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from containers import encoded
from images import varied
from PIL import Image

from scan_fast.data import DataConfig, open_splits
from scan_fast.data.datasets import STATISTICS
from scan_fast.data.kinds import tinyimagenet
from scan_fast.errors import DataError

IDS = ("n01443537", "n01629819", "n01641577")
WORDS = "n00001740\tentity\nn01629819\tcrane, heron\nn01443537\tgoldfish, Carassius auratus\nn01641577\tcrane\n"
TRAIN, VAL = 4, 2


def write_official(root: Path) -> Path:
    """Write the layout of the archive: 64 x 64 pixels, boxes beside the images, unlabelled test images."""
    pixels = iter(varied(64, 64, 64).numpy())

    def write(file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(next(pixels)))

    lines = []
    for name in IDS:
        for number in range(TRAIN):
            write(root / "train" / name / "images" / f"{name}_{number}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t10\t63\t58\n")
    # The validation images are in no order of classes.
    for number in range(VAL * len(IDS)):
        write(root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{IDS[(number + 1) % 3]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write(root / "test" / "images" / "test_0.JPEG")
    (root / "wnids.txt").write_text("\n".join(reversed(IDS)) + "\n")
    (root / "words.txt").write_text(WORDS)
    return root


def rearrange(root: Path, test: str, inner: str = "") -> None:
    """Make a folder per class of the validation images."""
    lines = [line.split("\t") for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
    for name, label, *_ in lines:
        target = root / "sorted" / label / inner
        target.mkdir(parents=True, exist_ok=True)
        (root / "val" / "images" / name).rename(target / name)
    if test == "val":  # with what a script leaves behind
        for name in IDS:
            (root / "sorted" / name).rename(root / "val" / name)
    else:
        shutil.rmtree(root / "val")
        shutil.rmtree(root / "test")
        (root / "sorted").rename(root / test)


def opened(root: Path, **options: object) -> Any:
    values = {"source": "tinyimagenet", "root": root, "download": False, **options}
    return open_splits(DataConfig.model_validate(values))


def test_the_archives_layout_is_read(tmp_path: Path) -> None:
    root = write_official(tmp_path / "tiny-imagenet-200")
    splits = opened(tmp_path)
    assert splits.train.paths[0] == f"train/{IDS[0]}/images/{IDS[0]}_0.JPEG" and len(splits.train) == TRAIN * 3
    assert splits.train.labels.tolist() == [0] * TRAIN + [1] * TRAIN + [2] * TRAIN
    assert splits.test.paths == [f"val/images/val_{number}.JPEG" for number in range(VAL * 3)]
    assert splits.test.labels.tolist() == [1, 2, 0, 1, 2, 0]
    names = ["goldfish", "crane (n01629819)", "crane (n01641577)"]
    assert splits.train.class_names == splits.test.class_names == names
    assert splits.pretext is None and (splits.mean, splits.std) == STATISTICS["imagenet"]
    # The images are stored at their own size, and the decoder is the one of every folder.
    pixels = torch.frombuffer(bytearray(Image.open(root / splits.test.paths[3]).tobytes()), dtype=torch.uint8)
    assert torch.equal(splits.test.read(torch.tensor([3]))[0].flatten(), pixels)
    assert opened(root, image_size=32).train.read(torch.arange(2)).shape == (2, 32, 32, 3)
    assert opened(root, labels="none").test.labels is None


@pytest.mark.parametrize(("test", "inner"), [("val", ""), ("val", "images"), ("test", ""), ("validation", "")])
def test_a_folder_per_class_gives_the_same_images(tmp_path: Path, test: str, inner: str) -> None:
    root = write_official(tmp_path)
    before = opened(root).test
    pixels = {Path(p).name: (before.read(torch.tensor([i])), before.labels[i]) for i, p in enumerate(before.paths)}
    rearrange(root, test, inner)
    (root / "words.txt").unlink()
    splits = opened(root)
    assert splits.train.class_names == splits.test.class_names == list(IDS)
    assert len(splits.test) == len(pixels) and splits.test.paths[0].startswith(f"{test}/{IDS[0]}/")
    for row, path in enumerate(splits.test.paths):
        image, label = pixels[Path(path).name]
        assert torch.equal(splits.test.read(torch.tensor([row])), image) and splits.test.labels[row] == label


@pytest.mark.parametrize("layout", ["official", "folders"])
def test_some_classes_in_their_own_order(tmp_path: Path, layout: str) -> None:
    root = write_official(tmp_path / "data")
    if layout == "folders":
        rearrange(root, "test")
    classes = tmp_path / "mine.txt"
    classes.write_text(f"{IDS[2]}\n{IDS[0]} goldfish\n")
    splits = opened(root, classes_file=classes)
    assert splits.train.class_names == splits.test.class_names == ["crane", "goldfish"]
    assert splits.train.labels.tolist() == [0] * TRAIN + [1] * TRAIN
    assert sorted(splits.test.labels.tolist()) == [0, 0, 1, 1]


# -- the archive -------------------------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """Serve a small archive; yields its file and the requests so far."""
    made = write_official(tmp_path / "made" / "tiny-imagenet-200")
    file = tmp_path / "served" / "tiny-imagenet-200.zip"
    file.parent.mkdir()
    with zipfile.ZipFile(file, "w") as packed:
        for path in sorted(made.rglob("*")):
            packed.write(path, path.relative_to(made.parent))
    requests: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            requests.append(str(arguments[1]))

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(file.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(tinyimagenet, "URL", f"http://127.0.0.1:{server.server_port}/{file.name}")
    monkeypatch.setattr(tinyimagenet, "MD5", hashlib.md5(file.read_bytes()).hexdigest())
    yield file, requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_archive_is_downloaded_checked_and_unpacked_once(
    tmp_path: Path, archive: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "new" / "folder"
    splits = opened(root, download=True)
    assert (len(splits.train), len(splits.test)) == (TRAIN * 3, VAL * 3)
    assert sorted(path.name for path in root.iterdir()) == ["tiny-imagenet-200", "tiny-imagenet-200.zip"]
    count = len(archive[1])
    assert count and opened(root, download=True).train.paths == splits.train.paths
    # Unpacked again without a network.
    shutil.rmtree(root / "tiny-imagenet-200")
    assert opened(root).train.paths == splits.train.paths and len(archive[1]) == count
    # By default it is kept where the other data sets are.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    open_splits(DataConfig(source="tinyimagenet"))
    assert (tmp_path / "home" / ".cache" / "scan-fast" / "data" / "tiny-imagenet-200" / "train").is_dir()


def test_half_an_archive_is_refused_or_downloaded_again(tmp_path: Path, archive: tuple[Path, list[str]]) -> None:
    root = tmp_path / "data"
    root.mkdir()
    whole = archive[0].read_bytes()
    (root / archive[0].name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{root}/tiny-imagenet-200\.zip is not complete, .*data\.download=true"):
        opened(root)
    assert len(opened(root, download=True).train) == TRAIN * 3
    # What the server has is half of it: nothing is unpacked.
    shutil.rmtree(root)
    archive[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be downloaded from http://.*: .*corrupted.*data\.download=false"):
        opened(root, download=True)
    assert [path.name for path in root.iterdir()] == [archive[0].name]
    archive[0].unlink()
    with pytest.raises(DataError, match=r"cannot be downloaded from http://.* to .*: HTTP Error 404"):
        opened(root, download=True)


# -- what is refused ---------------------------------------------------------------------------------------------------


def remove(path: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        target = root / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()

    return change


def append(path: str, text: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        with (root / path).open("a") as file:
            file.write(text)

    return change


def moved(source: str, target: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        (root / source).rename(root / target)

    return change


def only_images(root: Path) -> None:
    """Leave training images without folders."""
    for file in (root / "train").rglob("*.JPEG"):
        file.rename(root / "train" / file.name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(""), r"has neither train/ nor tiny-imagenet-200/ nor tiny-imagenet-200\.zip\. To go on, set data\.d"),
        (remove("train"), r"has val/ but no train/"),
        (
            remove(f"train/{IDS[1]}/images"),
            rf"lacks images of 1 of the 3 classes in wnids\.txt, first {IDS[1]}; unpack",
        ),
        (only_images, r"train must have one sub-folder per class \(WordNet id\)"),
        (remove("val"), r"must hold val/images/ with val/val_annotations\.txt, or val/ or test/ with one sub-folder"),
        (remove("val/images"), r"must hold val/images/ with val/val_annotations\.txt"),
        (remove("val/val_annotations.txt"), r"val_annotations\.txt does not exist: without it the images in .* labels"),
        (
            remove("val/images/val_1.JPEG"),
            r"images lacks 1 of the 6 images that val_annotations\.txt names, first val_1",
        ),
        (
            append("val/val_annotations.txt", "val_9.JPEG\n"),
            r"txt: line 7 must hold a file and its class: 'val_9.JPEG'",
        ),
        (append("val/val_annotations.txt", f"val_0.JPEG\t{IDS[0]}\n"), r"txt: line 7 names an image again"),
        (
            append("val/val_annotations.txt", "val_9.JPEG\tn07\n"),
            r"val has images of n07, of which .*train has none; unpack",
        ),
        (moved("val/images/val_1.JPEG", "val/images/val_7.JPEG"), r"lacks 1 of the 6 images that"),
        (lambda root: (root / "words.txt").write_bytes(b"\xff\xfe"), r"words\.txt is no text in UTF-8"),
    ],
)
def test_what_is_amiss_is_said_in_one_line(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    root = write_official(tmp_path / "data")
    change(root)
    with pytest.raises(DataError, match=message) as refusal:
        opened(root)
    assert "\n" not in str(refusal.value)


def test_folders_of_other_classes_are_refused(tmp_path: Path) -> None:
    root = write_official(tmp_path)
    rearrange(root, "test")
    (root / "test" / IDS[1]).rename(root / "test" / "n07")
    shutil.copytree(root / "test" / "n07", root / "test" / "n08")
    with pytest.raises(DataError, match=r"test has images of n07 and 1 more, of which .*train has none"):
        opened(root)
    for name in ("n07", "n08"):
        shutil.rmtree(root / "test" / name)
    with pytest.raises(DataError, match=rf"test lacks 1 of the 3 class folders, first {IDS[1]}"):
        opened(root)


def test_images_that_do_not_fit_the_annotations_may_be_skipped(tmp_path: Path) -> None:
    root = write_official(tmp_path)
    (root / "val" / "images" / "val_1.JPEG").rename(root / "val" / "images" / "val_7.JPEG")
    (root / "val" / "images" / "val_2.JPEG").write_bytes(b"no image")
    splits = opened(root, on_error="skip")
    assert [Path(path).name for path in splits.test.paths] == ["val_0.JPEG", "val_3.JPEG", "val_4.JPEG", "val_5.JPEG"]
    assert splits.test.labels.tolist() == [1, 1, 2, 0]
    skipped = dict(splits.test.source.skipped)
    assert skipped["val/images/val_1.JPEG"] == "val_annotations.txt names it, but it does not exist"
    assert skipped["val/images/val_7.JPEG"] == "val_annotations.txt does not name it"
    assert "UnidentifiedImageError" in skipped["val/images/val_2.JPEG"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.root: .*file is not a folder"):
        opened(tmp_path / "file", download=True)
