"""Opening of the train, test and pretext images that a configuration selects, and of images that a user passes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..random import permutation, stream_key
from .config import DataConfig
from .decode_cache import DecodeCache
from .encoded import ImagePaths
from .folders import list_folder
from .kinds import SOURCES, ContainerKind, Triple, absolute_source, find_kind, is_prefixed
from .kinds.folder import folder_contents
from .kinds.kind import Contents, Opened, file_source, held_out
from .sources import Source, SubsetSource, TensorSource, dataset_source

__all__ = [
    "STATISTICS",
    "DataConfig",
    "Splits",
    "Triple",
    "open_splits",
    "settings_for",
    "source_from",
    "split_source",
]

#: Per-channel mean and standard deviation in [0, 1] of the sources that have their own.
STATISTICS: dict[str, tuple[Triple, Triple]] = {
    name: kind.statistics for name, kind in SOURCES.items() if kind.statistics is not None
}


@dataclass
class Splits:
    """Opened images of a run.

    Attributes:
        train: images to train on.
        test: held-out images, for model selection and reporting; None if all images are trained on.
        pretext: a larger set for the pretext stage, or None.
        mean, std: per-channel normalisation in [0, 1].
        unused: what lies beside the splits and belongs to none of them, such as ``val`` if there is a ``test``.
    """

    train: Source
    test: Source | None
    pretext: Source | None
    mean: Triple
    std: Triple
    unused: Sequence[str] = ()


def open_splits(config: DataConfig, decode_cache: DecodeCache | None = None) -> Splits:
    """Open the images that a configuration selects.

    Args:
        config: which images.
        decode_cache: images that an earlier start has decoded without an error. With ``on_error=skip`` and images that
            are not resident, they are not decoded again; the others are entered.

    Raises:
        DataError: if images are missing, unreadable or inconsistent; the message says what would be right.
    """
    opened = find_kind(config.source).open(config, decode_cache)
    if config.labels == "none":
        for source in (opened.train, opened.test, opened.pretext):
            if source is not None:
                source.labels = source.class_names = None
    return _splits(opened, config)


def split_source(source: Source, config: DataConfig) -> Splits:
    """Hold ``data.test_fraction`` of any source out for testing, by a hash of each image's name; none if it is 0.

    Raises:
        DataError: if one image is to be split, or for ``data.shuffle=shards`` if the images are not in shards.
    """
    return _splits(Opened(*held_out(source, config.test_fraction)), config)


def _splits(opened: Opened, config: DataConfig) -> Splits:
    train, test, pretext, unused = opened
    if config.shuffle == "shards" and any(each is not None and each.groups is None for each in (train, pretext)):
        raise DataError(
            "data.shuffle=shards is for images in tar files (webdataset:SHARDS) or Parquet (parquet:GLOB), which "
            f"{config.source} does not have; set data.shuffle=images"
        )
    mean, std = _statistics(config)
    return Splits(
        train=_limited(train, config.limit),
        test=test,
        pretext=None if pretext is None else _limited(pretext, config.limit),
        mean=mean,
        std=std,
        unused=unused,
    )


def _statistics(config: DataConfig) -> tuple[Triple, Triple]:
    mean, std = find_kind(config.source).statistics or STATISTICS["imagenet"]
    return config.mean or mean, config.std or std


def _limited(source: Source, limit: int | None) -> Source:
    """Return `limit` images, drawn by a permutation that depends only on the number of images, in their old order."""
    if limit is None or limit >= len(source):
        return source
    return SubsetSource(source, permutation(stream_key(0, "limit"), 0, len(source))[:limit].sort().values)


def settings_for(images: str) -> dict[str, str]:
    """Return the configuration values for a folder or ``PREFIX:ARGUMENT``, with absolute paths, and a name for the run.

    Args:
        images: as in :func:`source_from`.
    """
    if is_prefixed(images):
        source = absolute_source(images)
        return {"data.source": source, "name": re.sub(r"\W+", "-", source.rpartition("/")[2]).strip("-")}
    folder = Path(images).expanduser().resolve()
    return {"data.source": "folder", "data.root": str(folder), "name": folder.name or "images"}


def source_from(images: Any, config: DataConfig | None = None, setting: str = "images") -> Source:
    """Open images that a user passes.

    Args:
        images: a folder (labelled if it has a sub-folder per class), ``PREFIX:ARGUMENT`` as in ``data.source`` (all
            splits together), a list of files, a torch Dataset, or an array or tensor (N, H, W, C) or (N, H, W) uint8.
        config: image_size (by default the images' own; for encoded images chosen as for a folder), interpolation,
            on_error, resident, decode and workers.
        setting: what named the images, for errors.

    Raises:
        DataError: for anything else, or if images cannot be read.
    """
    config = config or DataConfig()
    size = config.image_size
    if isinstance(images, str) and is_prefixed(images):
        kind = find_kind(images)
        assert isinstance(kind, ContainerKind)
        return kind.open_all(config.model_copy(update={"source": images}))
    if isinstance(images, (str, Path)):
        listing = list_folder(Path(images).expanduser(), setting=setting)
        return file_source(folder_contents(listing, listing.folder), config)
    if isinstance(images, (Tensor, np.ndarray)):
        return TensorSource(torch.as_tensor(images), size=size, interpolation=config.filter)
    if isinstance(images, (list, tuple)):
        if not images:
            raise DataError("images must not be empty, got an empty list")
        if not all(isinstance(item, (str, Path)) for item in images):
            raise DataError(f"a list of images must hold file paths, got {type(images[0]).__name__}")
        files = [os.path.expanduser(item) for item in images]
        return file_source(Contents(ImagePaths(files)), config)
    if hasattr(images, "__len__") and hasattr(images, "__getitem__"):
        return dataset_source(images, size, config.filter)
    raise DataError(
        "images must be a folder, a source such as webdataset:SHARDS, a list of files, a torch Dataset, "
        "or a uint8 array or tensor (N, H, W, C), "
        f"got {type(images).__name__}"
    )
