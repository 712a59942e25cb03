"""Tiny-ImageNet: 200 classes of ImageNet in 64 x 64 pixels, as published or with a folder per class."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from ...errors import DataError
from ..agreement import in_turn, on_all
from ..containers import read_list
from ..decode_cache import DecodeCache
from ..folders import TRAIN_NAMES, Listing, check_folder, find_images, find_split, list_folder
from .folder import class_list, split_contents
from .kind import Contents, Opened, SourceKind, open_contents

if TYPE_CHECKING:
    from ..config import DataConfig

URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
FOLDER = "tiny-imagenet-200"
SIZE = 64
ANNOTATIONS = "val_annotations.txt"


def _open(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    """Open the training images and, as test images, the labelled validation images."""
    root = in_turn(lambda: _folder(config))
    contents = on_all(lambda: _contents(root, config))
    return open_contents(contents, config, size=config.image_size or SIZE, decode_cache=decode_cache)


def _contents(root: Path, config: DataConfig) -> Contents:
    train_folder = find_split(root, TRAIN_NAMES)
    assert train_folder is not None
    chosen = class_list(config)
    train = list_folder(train_folder, chosen)
    if train.class_names is None:
        raise DataError(f"{train_folder} must have one sub-folder per class (WordNet id), with the images in it")
    if chosen is None:
        _check_classes(root, train)
    test = _test_images(root, train, config)
    names = _class_names(root, train.class_names)
    return split_contents(replace(train, class_names=names), replace(test, class_names=names), root)


# -- its folder --------------------------------------------------------------------------------------------------------


def _folder(config: DataConfig) -> Path:
    """Return the folder that holds train/, after downloading and unpacking the archive if need be.

    Raises:
        DataError: if it is neither there nor can be had.
    """
    root = (config.root or Path("~/.cache/scan-fast/data")).expanduser()
    if root.exists():
        check_folder(root)
        for folder in (root, root / FOLDER):
            if folder.is_dir() and find_split(folder, TRAIN_NAMES) is not None:
                return folder
            if folder.is_dir() and (part := find_split(folder, ("val", "test"))) is not None:
                raise DataError(f"{folder} has {part.name}/ but no train/: Tiny-ImageNet has both")
    archive = root / f"{FOLDER}.zip"
    _fetch(archive, config)
    # Unpacked beside and then renamed, so that a kill leaves no half of it.
    with TemporaryDirectory(prefix=f".{FOLDER}-", dir=root) as temporary:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(temporary)
        if not (Path(temporary) / FOLDER).is_dir():
            raise DataError(f"{archive} does not hold the folder {FOLDER}")
        os.replace(Path(temporary) / FOLDER, root / FOLDER)
    return root / FOLDER


def _fetch(archive: Path, config: DataConfig) -> None:
    """See to it that the archive is there and complete.

    Raises:
        DataError: if it is not, and cannot be downloaded.
    """
    from torchvision.datasets.utils import check_integrity, download_url

    if not config.download:
        if not archive.exists():
            raise DataError(
                f"tinyimagenet cannot be opened in {archive.parent}: it has neither train/ nor {FOLDER}/ nor "
                f"{archive.name}. To go on, set data.download=true, or data.root to the folder that holds the data set."
            )
        if not check_integrity(str(archive), MD5):
            raise DataError(
                f"{archive} is not complete, or is another file: its MD5 is not {MD5}. To go on, set "
                "data.download=true, or put the original archive there."
            )
        return
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        download_url(URL, str(archive.parent), archive.name, MD5)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"tinyimagenet cannot be downloaded from {URL} to {archive.parent}: {error}. To go on, check the network, "
            f"or put the original {archive.name} there and set data.download=false."
        ) from error


def _check_classes(root: Path, train: Listing) -> None:
    """Check that no class of wnids.txt is missing, if there is such a file."""
    file = root / "wnids.txt"
    if not file.is_file():
        return
    listed = [line.split()[0] for line in _lines(file)]
    missing = sorted(set(listed).difference(train.class_names or ()))
    if missing:
        raise DataError(
            f"{train.folder} lacks images of {len(missing)} of the {len(listed)} classes in wnids.txt, first "
            f"{missing[0]}; {_ADVICE}"
        )


_ADVICE = "unpack the archive again, or name the classes to use with data.classes_file"


# -- test images -------------------------------------------------------------------------------------------------------


def _test_images(root: Path, train: Listing, config: DataConfig) -> Listing:
    """List the labelled validation images, in either layout."""
    classes = train.class_names or []
    folder = find_split(root, ("val", "validation"))
    # The test images of the archive have no labels; re-arranged copies call the validation images test.
    folder = folder or find_split(root, ("test",))
    if folder is not None and folder.name.lower() != "test" and _has_images(folder / "images"):
        return _annotated(folder, train, config)
    if folder is None or not any((folder / name).is_dir() for name in classes):
        raise DataError(
            f"{root} must hold val/images/ with val/{ANNOTATIONS}, or val/ or test/ with one sub-folder per class"
        )
    if config.classes_file is None:
        known = {*classes, "images"}
        others = [entry for entry in folder.iterdir() if entry.name not in known and not entry.name.startswith(".")]
        _refuse_unknown([entry.name for entry in others if _has_images(entry)], folder, train)
    return list_folder(folder, classes)


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and bool(find_images(folder)[0])


def _annotated(folder: Path, train: Listing, config: DataConfig) -> Listing:
    """List the images of val/images with the labels of val_annotations.txt."""
    file = folder / ANNOTATIONS
    if not file.is_file():
        raise DataError(f"{file} does not exist: without it the images in {folder / 'images'} have no labels")
    class_of: dict[str, str] = {}
    for number, line in enumerate(_lines(file), 1):
        cells = line.split()
        if len(cells) < 2 or cells[0] in class_of:
            problem = "names an image again" if len(cells) > 1 else "must hold a file and its class"
            raise DataError(f"{file}: line {number} {problem}: {line!r}")
        class_of[cells[0]] = cells[1]
    classes = train.class_names or []
    if config.classes_file is None:
        _refuse_unknown(set(class_of.values()).difference(classes), folder, train)
    present, problems = find_images(folder / "images")
    seen = {*present, *(name for name, _ in problems)}
    missing = [name for name in class_of if name not in seen]
    unlabelled = [name for name in present if name not in class_of]
    for names, what in (
        (missing, f"{folder / 'images'} lacks {{}} of the {len(class_of)} images that {ANNOTATIONS} names"),
        (unlabelled, f"{file} lacks {{}} of the {len(present)} images in {folder / 'images'}"),
    ):
        if names and config.on_error == "raise":
            raise DataError(
                f"{what.format(len(names))}, first {names[0]}; unpack the archive again, or leave them out with "
                "data.on_error=skip"
            )
    problems += [(name, f"{ANNOTATIONS} names it, but it does not exist") for name in missing]
    problems += [(name, f"{ANNOTATIONS} does not name it") for name in unlabelled]
    rank = {name: number for number, name in enumerate(classes)}
    files = [name for name in present if class_of.get(name) in rank]
    return Listing(
        folder,
        [f"images/{name}" for name in files],
        torch.tensor([rank[class_of[name]] for name in files], dtype=torch.int64),
        classes,
        [(f"images/{name}", reason) for name, reason in problems],
    )


def _refuse_unknown(names: Iterable[str], folder: Path, train: Listing) -> None:
    others = sorted(names)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise DataError(f"{folder} has images of {others[0]}{more}, of which {train.folder} has none; {_ADVICE}")


# -- names -------------------------------------------------------------------------------------------------------------


def _class_names(root: Path, classes: Sequence[str]) -> list[str]:
    """Return the first name in words.txt of each class, followed by its WordNet id if two agree; else the id alone."""
    file = root / "words.txt"
    if not file.is_file():
        return list(classes)
    words = {}
    for line in _lines(file):
        name, _, text = line.partition("\t")
        words[name.strip()] = text.partition(",")[0].strip()
    names = [words.get(name) or name for name in classes]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name} ({own})" for name, own in zip(names, classes, strict=True)]


def _lines(file: Path) -> list[str]:
    return [line for line in read_list(file, str(file)) if line.strip()]


TINYIMAGENET = SourceKind("tinyimagenet", _open)
