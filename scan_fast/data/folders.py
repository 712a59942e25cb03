"""Image folders: which layouts are recognised, which files count, and how a test part is held out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DataError
from .decode import IMAGE_SUFFIXES, read_header

TRAIN_NAMES = ("train",)
TEST_NAMES = ("test", "val", "validation")


@dataclass(frozen=True)
class Listing:
    """Image files below one folder.

    Attributes:
        folder: the folder.
        files: their paths relative to it, with slashes, sorted folder by folder.
        labels: (N,) int64 rank of each file's sub-folder, where there is one per class.
        class_names: the sub-folders' names.
        problems: (path, reason) of what could not be listed: folders that may not be opened, broken links, pipes.
    """

    folder: Path
    files: list[str]
    labels: Tensor | None
    class_names: list[str] | None
    problems: list[tuple[str, str]]

    def take(self, indices: Sequence[int]) -> Listing:
        """Return the listing of some of the files."""
        labels = None if self.labels is None else self.labels[torch.tensor(indices, dtype=torch.int64)]
        return Listing(self.folder, [self.files[i] for i in indices], labels, self.class_names, [])


def check_folder(folder: Path, setting: str = "data.root") -> None:
    """Raise DataError unless the path is a folder."""
    if not folder.exists():
        raise DataError(f"{setting}: the folder {folder} does not exist")
    if not folder.is_dir():
        raise DataError(f"{setting}: {folder} is not a folder; name the folder that holds the images")


def find_images(folder: Path) -> tuple[list[str], list[tuple[str, str]]]:
    """Find every image file below a folder.

    A file counts by its suffix; hidden files and folders do not count. Links are followed, except back to a folder
    that they lie in.

    Returns:
        The files' paths relative to the folder, sorted by their parts, and (path, reason) of what could not be listed.
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

    # A stack of the folders that are open, as names may nest deeper than Python calls may.
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
                entry.stat()  # a broken link says so
                problems.append((path, "it is neither a file nor a folder"))
        except OSError as error:
            if image or not entry.is_symlink():
                problems.append((path, f"{type(error).__name__}: {error.strerror}"))
    return found, problems


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def list_folder(folder: Path, classes: Sequence[str] | None = None, labelled: bool = True) -> Listing:
    """List a folder: labelled where it holds two or more sub-folders of images and no image beside them.

    Args:
        folder: the folder.
        classes: take these sub-folders only, in this order of labels.
        labelled: False lists the same files without labels.

    Raises:
        DataError: where a class has no folder, or there is no image at all.
    """
    check_folder(folder)
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
    """Return the sub-folder with the first of the names, whatever its case."""
    present = {entry.name.lower(): entry for entry in sorted(root.iterdir()) if entry.is_dir()}
    return next((present[name] for name in names if name in present), None)


def split_folder(
    root: Path, test_fraction: float, classes: Sequence[str] | None = None, labelled: bool = True
) -> tuple[Listing, Listing]:
    """List the train and test images of a folder.

    A folder with ``train/`` and one of ``test/``, ``val/``, ``validation/`` is split as it is; of any other, the test
    part is held out by :func:`held_out`.

    Raises:
        DataError: for a missing or empty folder, classes that differ between the splits, or a test split without train.
    """
    check_folder(root)
    train, test = find_split(root, TRAIN_NAMES), find_split(root, TEST_NAMES)
    if train is None and test is not None and not _has_other_content(root):
        raise DataError(
            f"{root} has {test.name}/ but no train/: rename the folder of the training images to train, "
            f"or point data.root at one of the folders in {root}"
        )
    if train is None or test is None:
        return held_out(list_folder(train or root, classes, labelled), test_fraction)
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


def _unlabelled(listing: Listing) -> Listing:
    return replace(listing, labels=None, class_names=None)


def _has_other_content(root: Path) -> bool:
    """Whether anything but split folders lies in the root."""
    return any(
        entry.name.lower() not in TEST_NAMES
        for entry in root.iterdir()
        if not entry.name.startswith(".") and (entry.is_dir() or entry.suffix.lower() in IMAGE_SUFFIXES)
    )


def held_out(listing: Listing, fraction: float) -> tuple[Listing, Listing]:
    """Split off a test part by a hash of each file's relative path, so that new files do not move the others.

    Raises:
        DataError: where fewer than two images leave nothing to hold out.
    """
    if len(listing.files) < 2:
        raise DataError(f"{listing.folder} holds {len(listing.files)} image; at least 2 are needed, one for testing")
    train, test = held_out_rows(listing.files, fraction)
    # What could not be listed belongs to neither part; the first one reports it.
    return replace(listing.take(train), problems=listing.problems), listing.take(test)


def held_out_rows(names: Sequence[str], fraction: float) -> tuple[list[int], list[int]]:
    """Split the rows of at least two named images into train and test by a hash of each name; neither is empty."""
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


def default_size(files: Sequence[str | Path], folder: str | Path = "") -> int:
    """Choose the side of the stored images from the median shorter side of up to 256 files below a folder.

    32 up to 40 pixels, 64 up to 80, 96 up to 128, and 128 above: larger inputs cost more than they usually bring, so
    224 must be asked for.
    """
    step = max(1, len(files) // 256)
    sides = []
    for file in files[::step]:
        try:
            header = read_header(os.path.join(folder, file))
        except Exception:  # An unreadable file is reported, by name, when all files are decode_cache.
            continue
        sides.append(min(header.height, header.width))
    median = sorted(sides)[len(sides) // 2] if sides else 0
    return next((size for limit, size in ((40, 32), (80, 64), (128, 96)) if median <= limit), 128)
