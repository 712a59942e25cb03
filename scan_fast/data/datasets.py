"""The images of a run: what the configuration says, and the train, test and pretext sources that it opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ..errors import DataError
from ..random import permutation, stream_key
from ..schema import Settings
from .decode_cache import DecodeCache
from .files import FileSource
from .folders import Listing, check_folder, default_size, find_split, held_out_rows, list_folder, split_folder
from .placement import Resident, image_bytes, kept_on_host
from .sources import Source, SubsetSource, TensorSource, dataset_source

Triple = tuple[float, float, float]

SourceName = Literal["digits", "cifar10", "cifar20", "stl10", "folder", "imagenet"]

#: Per-channel mean and standard deviation in [0, 1], as the SCAN reference normalises with them.
STATISTICS: dict[str, tuple[Triple, Triple]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar20": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    # Of the 1,797 digits, computed from the images that this module makes.
    "digits": ((0.3053, 0.3053, 0.3053), (0.3759, 0.3759, 0.3759)),
}

SUBSETS = Path(__file__).parent / "subsets"

#: The superclass of each of CIFAR-100's 100 fine labels, in the dataset's own numbering.
CIFAR20_COARSE = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip
CIFAR20_NAMES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
    "household_electrical_devices", "household_furniture", "insects", "large_carnivores",
    "large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores",
    "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees", "vehicles_1",
    "vehicles_2",
)  # fmt: skip


class DataConfig(Settings):
    """Which images a run works on.

    Attributes:
        source: a known dataset, or "folder" for your own images.
        root: the folder of images; for the known datasets, where they are kept (default ~/.cache/scan-fast/data).
        download: whether a missing dataset may be downloaded.
        image_size: side of the stored square images. Default: the dataset's own; for a folder 32, 64, 96 or 128 by the
            median shorter side (see `folders.default_size`); 224 for ImageNet.
        mean, std: per-channel normalisation in [0, 1]. Default: the dataset's; ImageNet's for folders.
        limit: train on this many images only, drawn at random, the same for every seed.
        test_fraction: part that is held out of a folder without a test split.
        classes_file: a file with one class folder's name per line, in the order of the labels; the bare names
            imagenet_50.txt, imagenet_100.txt and imagenet_200.txt are SCAN's ImageNet subsets.
        labels: "auto" reads them where there are any, to report on; "none" ignores them.
        on_error: "raise" at an unreadable image, or "skip" it and list it in skipped.csv.
        resident: where the images are kept. "host": decoded once, in memory. "device": likewise, then moved to the
            run's GPU. "files": there only, and decoded at each use; images that are in no files are on the host
            all the same. "auto": on the host where all of them take at most half of the free memory, and from there on
            to a GPU of which they take at most a quarter of the free memory. The results are the same.
        crop: what a view's box is cut out of. "image": the image of image_size pixels. "file": the same part of the
            file in its own resolution, so that small boxes of large photographs stay sharp and nothing is resized
            twice; the files are then decoded at each use. Images that are in no files are as with "image".
        decode: "exact" decodes every pixel before an image is resized; "scaled" decodes a JPEG at 1/2, 1/4 or 1/8 as
            long as what is cut out of it stays at least twice as large as it is to be, which takes large photographs a
            fraction of the time and moves levels a little.
        workers: decoding threads; by default one per core, at most 16.
        renderer: what makes the views: "fused" (one native kernel, on the devices it is compiled for), "dali" (NVIDIA
            DALI, on a GPU or the CPU), "torch" (torch operations, on any device), or "auto" for fused where that is
            possible, else torch.
    """

    source: SourceName = "folder"
    root: Path | None = None
    download: bool = True
    image_size: int | None = Field(default=None, ge=1)
    mean: Triple | None = None
    std: Triple | None = None
    limit: int | None = Field(default=None, ge=1)
    test_fraction: float = Field(default=0.1, gt=0, lt=1)
    classes_file: Path | None = None
    labels: Literal["auto", "none"] = "auto"
    on_error: Literal["raise", "skip"] = "raise"
    resident: Resident = "auto"
    crop: Literal["image", "file"] = "image"
    decode: Literal["exact", "scaled"] = "exact"
    workers: int | None = Field(default=None, ge=1)
    renderer: Literal["auto", "torch", "dali", "fused"] = "auto"

    @model_validator(mode="after")
    def _files_are_read(self) -> Self:
        if self.crop == "file" and self.resident in ("host", "device"):
            raise ValueError(f"crop=file decodes files at each use: set resident to auto or files, not {self.resident}")
        return self

    def keeps(self, n: int, size: int) -> bool:
        """Return whether n images in files are decoded once and kept, as square images of `size` pixels."""
        return self.crop == "image" and kept_on_host(self.resident, image_bytes(n, size))


@dataclass
class Splits:
    """The opened images.

    Attributes:
        train: images to learn from.
        test: held-out images, to select and to report on.
        pretext: a larger set for the first stage, where there is one.
        mean, std: per-channel normalisation in [0, 1].
    """

    train: Source
    test: Source
    pretext: Source | None
    mean: Triple
    std: Triple


def open_splits(config: DataConfig, decode_cache: DecodeCache | None = None) -> Splits:
    """Open the images that a configuration names.

    Args:
        config: which images.
        decode_cache: the files that an earlier start has decoded and found good. With ``on_error=skip`` and images
            that stay in their files, they are not decoded again; the others are entered.

    Raises:
        DataError: where they are missing, unreadable or inconsistent; the message says what would be right.
    """
    if config.source in _FILE_OPENERS:
        train, test, pretext = _FILE_OPENERS[config.source](config, decode_cache)
    else:
        train, test, pretext = _ARRAY_OPENERS[config.source](config)
    if config.labels == "none":
        for source in (train, test, pretext):
            if source is not None:
                source.labels = source.class_names = None
    mean, std = STATISTICS.get(config.source, STATISTICS["imagenet"])
    return Splits(
        train=_limited(train, config.limit),
        test=test,
        pretext=None if pretext is None else _limited(pretext, config.limit),
        mean=config.mean or mean,
        std=config.std or std,
    )


def split_source(source: Source, config: DataConfig) -> Splits:
    """Hold a part of any source out for testing, by a hash of each image's name.

    Raises:
        DataError: for fewer than two images.
    """
    if len(source) < 2:
        raise DataError(f"{len(source)} image is too few; at least 2 are needed, one for testing")
    train, test = held_out_rows(source.paths, config.test_fraction)
    mean, std = STATISTICS.get(config.source, STATISTICS["imagenet"])
    return Splits(
        train=_limited(SubsetSource(source, torch.tensor(train)), config.limit),
        test=SubsetSource(source, torch.tensor(test)),
        pretext=None,
        mean=config.mean or mean,
        std=config.std or std,
    )


def _limited(source: Source, limit: int | None) -> Source:
    """Keep `limit` images, drawn by a permutation that depends on the number of images alone, in their old order."""
    if limit is None or limit >= len(source):
        return source
    return SubsetSource(source, permutation(stream_key(0, "limit"), 0, len(source))[:limit].sort().values)


def _dataset_root(config: DataConfig) -> Path:
    root = config.root if config.root is not None else Path("~/.cache/scan-fast/data")
    return root.expanduser()


def _torchvision(name: str, config: DataConfig, **options: Any) -> Any:
    """Open a torchvision dataset, downloading it where that is allowed."""
    from torchvision import datasets

    root = _dataset_root(config)
    try:
        if config.download:
            root.mkdir(parents=True, exist_ok=True)
        return getattr(datasets, name)(root=str(root), download=config.download, **options)
    except (OSError, RuntimeError) as error:
        advice = (
            "check the network, or put the dataset's original archive there and set data.download=false"
            if config.download
            else "set data.download=true, or data.root to the folder that holds the dataset"
        )
        raise DataError(f"{config.source} cannot be opened in {root}: {error}. To go on, {advice}.") from error


Opened = tuple[Source, Source, "Source | None"]


def _open_digits(config: DataConfig) -> Opened:
    """Scikit-learn's 1,797 handwritten digits of 8x8 pixels; a fixed random quarter is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(-1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = permutation(stream_key(0, "digits"), 0, len(grey))
    cut = len(grey) // 4

    def part(name: str, indices: Tensor) -> TensorSource:
        paths = [f"digits/{name}/{i:04d}" for i in indices.tolist()]
        return TensorSource(grey[indices], labels[indices], paths, [str(d) for d in range(10)], config.image_size)

    return part("train", order[cut:].sort().values), part("test", order[:cut].sort().values), None


def _array_source(
    name: str, images: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str], config: DataConfig
) -> TensorSource:
    width = len(str(len(images) - 1))
    paths = [f"{config.source}/{name}/{i:0{width}d}" for i in range(len(images))]
    return TensorSource(
        torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64), paths, names, config.image_size
    )


def _open_cifar10(config: DataConfig) -> Opened:
    train, test = (_torchvision("CIFAR10", config, train=part) for part in (True, False))
    return (
        _array_source("train", train.data, train.targets, train.classes, config),
        _array_source("test", test.data, test.targets, test.classes, config),
        None,
    )


def _open_cifar20(config: DataConfig) -> Opened:
    """CIFAR-100 with its 20 superclasses."""
    coarse = np.array(CIFAR20_COARSE)
    train, test = (_torchvision("CIFAR100", config, train=part) for part in (True, False))
    return (
        _array_source("train", train.data, coarse[train.targets], CIFAR20_NAMES, config),
        _array_source("test", test.data, coarse[test.targets], CIFAR20_NAMES, config),
        None,
    )


def _open_stl10(config: DataConfig) -> Opened:
    """STL-10; its 100,000 unlabelled images join the training images for the pretext stage."""
    train, test, extra = (_torchvision("STL10", config, split=split) for split in ("train", "test", "unlabeled"))

    def interleaved(data: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data.transpose(0, 2, 3, 1))

    train_source = _array_source("train", interleaved(train.data), train.labels, train.classes, config)
    test_source = _array_source("test", interleaved(test.data), test.labels, test.classes, config)
    # Filled in place: the unlabelled images alone are 2.8 GB, and a concatenation would hold them twice.
    images = np.empty((len(train.data) + len(extra.data), 96, 96, 3), dtype=np.uint8)
    images[: len(train.data)] = train.data.transpose(0, 2, 3, 1)
    images[len(train.data) :] = extra.data.transpose(0, 2, 3, 1)
    paths = [*train_source.paths, *(f"stl10/unlabeled/{i:05d}" for i in range(len(extra.data)))]
    return train_source, test_source, TensorSource(torch.from_numpy(images), None, paths, None, config.image_size)


def _open_folder(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    if config.root is None:
        raise DataError("data.root must name the folder of images when data.source is 'folder'")
    root = config.root.expanduser()
    check_folder(root)
    train, test = split_folder(root, config.test_fraction, _classes(config), labelled=config.labels == "auto")
    size = config.image_size or default_size(train.files, train.folder)
    train_source, test_source = _files((train, test), root, size, config, decode_cache)
    return train_source, test_source, None


def _open_imagenet(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    """ImageNet's training and validation folders, of one sub-folder per class."""
    if config.root is None:
        raise DataError("data.root must name the folder that holds ImageNet's train/ and val/: it is not downloaded")
    root = config.root.expanduser()
    check_folder(root)
    train = find_split(root, ("train", "ilsvrc2012_img_train"))
    test = find_split(root, ("val", "validation", "test", "ilsvrc2012_img_val"))
    if train is None or test is None:
        raise DataError(f"{root} must hold train/ and val/ with one sub-folder per class (WordNet id)")
    classes = _classes(config)
    if classes is None:
        classes = list_folder(train).class_names
    parts = [list_folder(part, classes) for part in (train, test)]
    train_source, test_source = _files(parts, root, config.image_size or 224, config, decode_cache)
    return train_source, test_source, None


def _classes(config: DataConfig) -> list[str] | None:
    """Read the class folders' names, in the order of their labels."""
    if config.classes_file is None:
        return None
    file = config.classes_file.expanduser()
    if not file.exists() and file.parent == Path():
        file = SUBSETS / file.name if file.suffix else SUBSETS / f"{file.name}.txt"
    if not file.is_file():
        shipped = ", ".join(sorted(path.name for path in SUBSETS.glob("*.txt")))
        raise DataError(f"data.classes_file: {config.classes_file} does not exist; shipped lists are {shipped}")
    # A line may go on with the class's name in words.
    names = [line.split()[0] for line in file.read_text().splitlines() if line.strip()]
    if not names or len(set(names)) < len(names):
        raise DataError(f"data.classes_file: {file} must name each class folder once, one a line")
    return names


def _files(
    listings: Sequence[Listing], root: Path, size: int, config: DataConfig, decode_cache: DecodeCache | None = None
) -> list[FileSource]:
    """Open the files of some folders below a root; all of them are kept in memory, or none."""
    resident = config.keeps(sum(len(listing.files) for listing in listings), size)
    sources = []
    for listing in listings:
        below = listing.folder.relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        sources.append(
            FileSource(
                [prefix + file for file in listing.files],
                listing.labels,
                size,
                root=root,
                class_names=listing.class_names,
                on_error=config.on_error,
                workers=config.workers,
                resident=resident,
                scaled=config.decode == "scaled",
                problems=[(prefix + path, reason) for path, reason in listing.problems],
                decode_cache=decode_cache,
            )
        )
    return sources


_ARRAY_OPENERS: dict[str, Callable[[DataConfig], Opened]] = {
    "digits": _open_digits,
    "cifar10": _open_cifar10,
    "cifar20": _open_cifar20,
    "stl10": _open_stl10,
}
_FILE_OPENERS: dict[str, Callable[[DataConfig, DecodeCache | None], Opened]] = {
    "folder": _open_folder,
    "imagenet": _open_imagenet,
}


def source_from(images: Any, config: DataConfig | None = None) -> Source:
    """Open images as a user hands them over.

    Args:
        images: a folder (labelled where it has a sub-folder per class), a list of files, a torch Dataset, or an array
            or tensor (N, H, W, C) or (N, H, W) uint8.
        config: image_size (by default the images' own, and for files as for a folder's), on_error, resident, decode and
            workers.

    Raises:
        DataError: for anything else, or images that cannot be read.
    """
    config = config or DataConfig()
    size = config.image_size
    if isinstance(images, (str, Path)):
        listing = list_folder(Path(images).expanduser())
        return _files([listing], listing.folder, size or default_size(listing.files, listing.folder), config)[0]
    if isinstance(images, (Tensor, np.ndarray)):
        return TensorSource(torch.as_tensor(images), size=size)
    if isinstance(images, (list, tuple)):
        if not images:
            raise DataError("images must not be empty, got an empty list")
        if not all(isinstance(item, (str, Path)) for item in images):
            raise DataError(f"a list of images must hold file paths, got {type(images[0]).__name__}")
        files = [os.path.expanduser(item) for item in images]
        size = size or default_size(files)
        return FileSource(
            files,
            None,
            size,
            on_error=config.on_error,
            workers=config.workers,
            resident=config.keeps(len(files), size),
            scaled=config.decode == "scaled",
        )
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return dataset_source(images, size)
    raise DataError(
        "images must be a folder, a list of files, a torch Dataset, or a uint8 array or tensor (N, H, W, C), "
        f"got {type(images).__name__}"
    )
