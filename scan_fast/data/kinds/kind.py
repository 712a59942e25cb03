"""Interface of an image source: a name or a prefix, and how it opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...errors import DataError
from ..decode_cache import DecodeCache
from ..encoded import EncodedImages
from ..files import FileSource
from ..folders import default_size, held_out_rows
from ..sources import Source

if TYPE_CHECKING:
    from ..config import DataConfig

Triple = tuple[float, float, float]

#: Train, test and, for a few sources, larger pretext images.
Opened = tuple[Source, Source, Source | None]


@dataclass(frozen=True)
class SourceKind:
    """A source that ``data.source`` selects by name.

    Attributes:
        name: the value of ``data.source``.
        open: opens the train, test and optional pretext images; raises DataError if they are missing or unreadable.
        statistics: per-channel mean and standard deviation in [0, 1]; ImageNet's if None.
    """

    name: str
    open: Callable[[DataConfig, DecodeCache | None], Opened]
    statistics: tuple[Triple, Triple] | None = None


@dataclass(frozen=True)
class Contents:
    """Encoded images of a source, with what is known of them.

    Attributes:
        images: all images, of every split.
        labels: (N,) int64 class numbers, or None.
        class_names: name of each class, or None.
        test: numbers of the images of the test split; None if the source has no splits.
        problems: (name, reason) of images that could not be listed.
    """

    images: EncodedImages
    labels: Tensor | None = None
    class_names: list[str] | None = None
    test: Sequence[int] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)

    def select(self, rows: Sequence[int]) -> Contents:
        """Return some of the images, without splits and problems."""
        labels = None if self.labels is None else self.labels[torch.tensor(rows, dtype=torch.int64)]
        return Contents(self.images.select(rows), labels, self.class_names)


@dataclass(frozen=True)
class ContainerKind:
    """A source that ``data.source=PREFIX:ARGUMENT`` selects by prefix: encoded images in files or containers.

    Attributes:
        name: the prefix.
        argument: description of the argument, for errors.
        index: lists the images that an argument selects; raises DataError if there are none.
        absolute: makes relative paths in an argument absolute, for run folders.
    """

    name: str
    argument: str
    index: Callable[[str, DataConfig], Contents]
    absolute: Callable[[str], str] = lambda argument: os.path.abspath(os.path.expanduser(argument))
    statistics: tuple[Triple, Triple] | None = None

    def open(self, config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
        """Open the source's own splits, or hold a part out for testing by a hash of each image's name.

        Raises:
            DataError: if images are missing, unreadable or fewer than two.
        """
        contents = self.index(_argument(config), config)
        n = len(contents.images)
        if contents.test is None:
            if n < 2:
                raise DataError(f"{config.source} holds {n} image; at least 2 are needed, one for testing")
            train, test = held_out_rows(contents.images.names, config.test_fraction)
        else:
            chosen = set(contents.test)
            train, test = [row for row in range(n) if row not in chosen], list(contents.test)
        parts = [contents.select(train), contents.select(test)]
        # Images that could not be listed belong to neither part; the first one reports them.
        parts[0].problems.extend(contents.problems)
        train_source, test_source = file_sources(parts, config, decode_cache=decode_cache)
        return train_source, test_source, None

    def open_all(self, config: DataConfig) -> Source:
        """Open the images of all splits as one source.

        Raises:
            DataError: if images are missing or unreadable.
        """
        return file_sources([self.index(_argument(config), config)], config)[0]


def _argument(config: DataConfig) -> str:
    return config.source.partition(":")[2]


def file_sources(
    parts: Sequence[Contents],
    config: DataConfig,
    *,
    size: int | None = None,
    decode_cache: DecodeCache | None = None,
) -> list[FileSource]:
    """Open several parts of a data set as the configuration says; all of them are resident, or none.

    Args:
        parts: the images of each part.
        config: image_size, interpolation, on_error, workers, decode, resident and crop are used.
        size: side of the square images; ``data.image_size`` by default, else chosen from the first part's images.
        decode_cache: images that an earlier start has decoded.

    Raises:
        DataError: if images are unreadable.
    """
    size = size or config.image_size or default_size(parts[0].images)
    resident = config.keeps(sum(len(part.images) for part in parts), size)
    return [
        FileSource(
            part.images,
            part.labels,
            size,
            class_names=part.class_names,
            on_error=config.on_error,
            workers=config.workers,
            resident=resident,
            scaled=config.decode == "scaled",
            interpolation=config.filter,
            problems=part.problems,
            decode_cache=decode_cache,
        )
        for part in parts
    ]
