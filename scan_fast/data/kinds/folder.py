"""Folders of images: the user's own, and ImageNet's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import DataError
from ..agreement import on_all
from ..containers import read_list
from ..decode_cache import DecodeCache
from ..encoded import ImagePaths
from ..folders import Listing, beside_splits, check_folder, find_split, list_folder, split_folder
from .kind import Contents, Opened, SourceKind, open_contents

if TYPE_CHECKING:
    from ..config import DataConfig

SUBSETS = Path(__file__).parents[1] / "subsets"


def _open_folder(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    return open_contents(on_all(lambda: _folder(config)), config, decode_cache=decode_cache)


def _folder(config: DataConfig) -> Contents:
    if config.root is None:
        raise DataError("data.root must name the folder of images when data.source is 'folder'")
    root = config.root.expanduser()
    check_folder(root)
    train, test = split_folder(root, class_list(config), labelled=config.labels == "auto")
    if test is None:
        contents = folder_contents(train, root)
    else:
        contents = split_contents(train, test, root)
    return replace(contents, unused=beside_splits(root, [part.folder for part in (train, test) if part is not None]))


def _open_imagenet(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    """Open ImageNet's training and validation folders, with one sub-folder per class."""
    contents = on_all(lambda: _imagenet(config))
    return open_contents(contents, config, size=config.image_size or 224, decode_cache=decode_cache)


def _imagenet(config: DataConfig) -> Contents:
    if config.root is None:
        raise DataError("data.root must name the folder that holds ImageNet's train/ and val/: it is not downloaded")
    root = config.root.expanduser()
    check_folder(root)
    train = find_split(root, ("train", "ilsvrc2012_img_train"))
    test = find_split(root, ("val", "validation", "test", "ilsvrc2012_img_val"))
    if train is None or test is None:
        raise DataError(f"{root} must hold train/ and val/ with one sub-folder per class (WordNet id)")
    classes = class_list(config)
    if classes is None:
        classes = list_folder(train).class_names
    return split_contents(list_folder(train, classes), list_folder(test, classes), root)


def folder_contents(listing: Listing, root: Path) -> Contents:
    """Return the images of a folder at or below a root; their names are relative to the root."""
    below = listing.folder.relative_to(root).as_posix()
    prefix = "" if below == "." else f"{below}/"
    problems = [(prefix + path, reason) for path, reason in listing.problems]
    files = ImagePaths([prefix + file for file in listing.files], root)
    return Contents(files, listing.labels, listing.class_names, problems=problems)


def split_contents(train: Listing, test: Listing, root: Path) -> Contents:
    """Return the images of a training and a test folder; they have labels if both do, of the same classes."""
    parts = [folder_contents(part, root) for part in (train, test)]
    names = [name for part in parts for name in part.images.names]
    labels = None
    if train.labels is not None and test.labels is not None and train.class_names == test.class_names:
        labels = torch.cat([train.labels, test.labels])
    return Contents(
        ImagePaths(names, root),
        labels,
        None if labels is None else train.class_names,
        range(len(train.files), len(names)),
        [problem for part in parts for problem in part.problems],
    )


def class_list(config: DataConfig) -> list[str] | None:
    """Return the names of the class folders, in the order of their labels; None if all folders count."""
    if config.classes_file is None:
        return None
    file = config.classes_file.expanduser()
    if not file.exists() and file.parent == Path():
        file = SUBSETS / file.name if file.suffix else SUBSETS / f"{file.name}.txt"
    if not file.is_file():
        shipped = ", ".join(sorted(path.name for path in SUBSETS.glob("*.txt")))
        raise DataError(f"data.classes_file: {config.classes_file} does not exist; shipped lists are {shipped}")
    # A line may continue with the class's name in words.
    lines = read_list(file, f"data.classes_file: {file}")
    names = [line.split()[0] for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        raise DataError(f"data.classes_file: {file} must name each class folder once, one a line")
    return names


FOLDER = SourceKind("folder", _open_folder)
IMAGENET = SourceKind("imagenet", _open_imagenet, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
