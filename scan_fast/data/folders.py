"""Image folders: recognised layouts and files, and the part that is held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .decode import read_header
from .encoded import EncodedImages
from .formats import IMAGE_SUFFIXES

TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class Listing:
    """Image files below one folder.

    Attributes:
        folder: the folder.
        files: their paths relative to it, with slashes, sorted folder by folder.
        labels: (N,) int64 rank of each file's sub-folder; None unless there is one sub-folder per class.
        class_names: names of the sub-folders, or None.
        problems: (path, reason) of entries that could not be listed: unreadable folders, broken links, pipes.
    """

    folder: Path
    files: list[str]
    labels: Tensor | None
    class_names: list[str] | None
    problems: list[tuple[str, str]]


def check_folder(folder: Path, setting: str = "data.root") -> None:
    """Raise DataError unless the path is a folder."""
    if not folder.exists():
        raise DataError(f"{setting}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise DataError(f"{setting}: {folder} is not a folder; name the folder that holds the images")


def find_images(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Find every image file below a folder.

    Files are recognised by suffix. Hidden files and folders do not count. Links are followed, except to a folder that
    contains them.

    Returns:
        Paths relative to the folder, sorted by their parts, and (path, reason) of entries that could not be listed.
    """
    found: list[str] = []
    problems: list[tuple[str, str]] = []

    def entries(prefix: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(os.path.join(folder, prefix)) as scan:
                visible = [entry for entry in scan if not entry.name.startswith(".")]
        except OSError as error:
            problems.append((prefix or ".", f"{type(error).__name__}: {error.strerror}"))
            return iter(())
        return iter(sorted(visible, key=lambda entry: entry.name))

    # A stack of open folders: folders may nest deeper than Python's recursion limit.
    stack = [("", entries(""), _identity(os.stat(folder)))]
    while stack:
        prefix, rest, _ = stack[-1]
        entry = next(rest, None)
        if entry is None:
            stack.pop()
            continue
        path = prefix + entry.name
        image = os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES
        try:
            if entry.is_dir():
                identity = _identity(entry.stat())
                if not entry.is_symlink() or all(identity != open_folder for *_, open_folder in stack):
                    stack.append((path + "/", entries(path + "/"), identity))
            elif image and entry.is_file():
                found.append(path)
            elif image:
                entry.stat()  # raises the error of a broken link
                problems.append((path, "it is neither a file nor a folder"))
        except OSError as error:
            if image or not entry.is_symlink():
                problems.append((path, f"{type(error).__name__}: {error.strerror}"))
    return found, problems


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def list_folder(
    folder: Path, classes: Sequence[str] | None = None, labelled: bool = True, setting: str = "data.root"
) -> Listing:
    """List a folder: labelled if it holds two or more sub-folders of images and no image outside them.

    Args:
        folder: the folder.
        classes: list these sub-folders only, in this order of labels.
        labelled: False lists the same files without labels.
        setting: what named the folder, for the error if there is none.

    Raises:
        DataError: if a class has no folder, or there is no image at all.
    """
    check_folder(folder, setting)
    if classes is not None:
        missing = [name for name in classes if not (folder / name).is_dir()]
        if missing:
            raise DataError(f"{folder} lacks {len(missing)} of the {len(classes)} class folders, first {missing[0]}")
        files, ranks, problems = [], [], []
        for rank, name in enumerate(classes):
            own, amiss = find_images(folder / name)
            if not own and not amiss:
                raise DataError(f"{folder / name} holds no images ({_looked_for()})")
            files += [f"{name}/{file}" for file in own]
            ranks += [rank] * len(own)
            problems += [(f"{name}/{path}", reason) for path, reason in amiss]
        names = list(classes)
    else:
        files, problems = find_images(folder)
        if not files:
            raise DataError(
                f"no images found in {folder}: looked for {_looked_for()} in it and its sub-folders"
                + (f"; {len(problems)} could not be read, first {': '.join(problems[0])}" if problems else "")
            )
        first = [file.partition("/")[::2] for file in files]
        names = sorted({name for name, _ in first})
        rank_of = {name: rank for rank, name in enumerate(names)}
        ranks = [rank_of[name] for name, _ in first]
        labelled = labelled and len(names) > 1 and all(rest for _, rest in first)
    if not labelled:
        return Listing(folder, files, None, None, problems)
    return Listing(folder, files, torch.tensor(ranks, dtype=torch.int64), names, problems)


def _looked_for() -> str:
    return " ".join(sorted("*" + suffix for suffix in IMAGE_SUFFIXES))


def find_split(root: Path, names: Sequence[str]) -> Path | None:
    """Return the sub-folder with the first of the names that exists, ignoring case."""
    present = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    return next((present[name] for name in names if name in present), None)


def split_folder(
    root: Path, classes: Sequence[str] | None = None, labelled: bool = True
) -> tuple[Listing, Listing | None]:
    """List the train and test images of a folder.

    ``train/`` and one of ``test/``, ``val/``, ``validation/`` are the splits if both exist; otherwise there is no test
    part.

    Raises:
        DataError: if the folder is missing or empty, classes differ between the splits, or train is missing.
    """
    check_folder(root)
    train, test = find_split(root, TRAIN_NAMES), find_split(root, TEST_NAMES)
    if train is None and test is not None and not _has_other_content(root):
        raise DataError(
            f"{root} has {test.name}/ but no train/: rename the folder of the training images to train, "
            f"or give one of the folders in {root} instead"
        )
    if train is None or test is None:
        return list_folder(train or root, classes, labelled), None
    train_part, test_part = (list_folder(part, classes, labelled) for part in (train, test))
    if train_part.class_names != test_part.class_names:
        if train_part.class_names is None or test_part.class_names is None:
            return _unlabelled(train_part), _unlabelled(test_part)
        ours, theirs = set(train_part.class_names), set(test_part.class_names)
        raise DataError(
            f"the class folders of {train} and {test} differ: only in {train.name}: {sorted(ours - theirs)[:5]}, "
            f"only in {test.name}: {sorted(theirs - ours)[:5]}. Rename them, or set data.labels=none"
        )
    return train_part, test_part


def beside_splits(root: Path, splits: Sequence[Path]) -> list[str]:
    """Return the names of folders and image files beside the folders of the splits; none if one is the root itself."""
    if root in splits:
        return []
    return sorted(entry.name for entry in _content(root) if entry not in splits)


def _unlabelled(listing: Listing) -> Listing:
    return replace(listing, labels=None, class_names=None)


def _has_other_content(root: Path) -> bool:
    """Return whether the root holds anything but split folders."""
    return any(entry.name.lower() not in TEST_NAMES for entry in _content(root))


def _content(root: Path) -> list[Path]:
    """Return the folders and image files in a folder that are not hidden."""
    return [
        entry
        for entry in root.iterdir()
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES)
    ]


def held_out_rows(names: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Split the rows of named images into train and test by a hash of each name.

    With a fraction above 0 and at least two images, neither part is empty. With 0 the test part is.
    """
    if fraction == 0 or len(names) < 2:
        return list(range(len(names))), []
    rank = [_hash01(name) for name in names]
    test = [i for i, value in enumerate(rank) if value < fraction]
    # Small folders: each part keeps at least one image.
    if not test:
        test = [min(range(len(rank)), key=rank.__getitem__)]
    elif len(test) == len(rank):
        test.remove(max(test, key=rank.__getitem__))
    chosen = set(test)
    return [i for i in range(len(rank)) if i not in chosen], test


def _hash01(text: str) -> float:
    """Hash a text to [0, 1)."""
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=6).digest(), "big") / 2**48


def default_size(images: EncodedImages) -> int:
    """Choose the side of the stored images from the median shorter side of up to 256 of them.

    32 up to 40 pixels, 64 up to 80, 96 up to 128, and 128 above: larger inputs cost more than they usually gain, so 224
    must be asked for.
    """
    step = max(1, len(images) // 256)
    sides = []
    for index in range(0, len(images), step):
        try:
            header = read_header(images.encoded(index))
        except Exception:  # an unreadable image is reported by name when all images are checked
            continue
        sides.append(min(header.height, header.width))
    median = sorted(sides)[len(sides) // 2] if sides else 0
    return next((size for limit, size in ((40, 32), (80, 64), (128, 96)) if median <= limit), 128)
