"""Interface of an image source: a name or a prefix, and how it opens."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ... import distributed
from ...errors import DataError
from ..checking import none_readable
from ..decode_cache import DecodeCache
from ..encoded import EncodedImages
from ..files import FileSource
from ..folders import default_size, held_out_rows
from ..sources import Source, SubsetSource

if TYPE_CHECKING:
    from ..config import DataConfig

Triple = tuple[float, float, float]


class Opened(NamedTuple):
    """Images of a source.

    Attributes:
        train: training images.
        test: held-out test images, or None.
        pretext: larger pretext images, for a few sources.
        unused: what lies beside the splits and belongs to none of them, such as ``val`` if there is a ``test``.
    """

    train: Source
    test: Source | None
    pretext: Source | None = None
    unused: Sequence[str] = ()


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
        unused: as in :class:`Opened`.
    """

    images: EncodedImages
    labels: Tensor | None = None
    class_names: list[str] | None = None
    test: Sequence[int] | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    unused: Sequence[str] = ()


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
        """Open the images as :func:`open_contents` does.

        Raises:
            DataError: if images are missing or unreadable.
        """
        return open_contents(self.index(_argument(config), config), config, decode_cache=decode_cache)

    def open_all(self, config: DataConfig) -> Source:
        """Open the images of all splits as one source.

        Raises:
            DataError: if images are missing or unreadable.
        """
        return file_source(self.index(_argument(config), config), config)


def _argument(config: DataConfig) -> str:
    return config.source.partition(":")[2]


def file_source(
    contents: Contents,
    config: DataConfig,
    *,
    size: int | None = None,
    decode_cache: DecodeCache | None = None,
) -> FileSource:
    """Open the images of all splits as one source, as the configuration says.

    Args:
        contents: the images.
        config: image_size, interpolation, identity, on_error, workers, decode, resident and crop are used.
        size: side of the square images; ``data.image_size`` by default, else chosen from the images.
        decode_cache: images that an earlier start has decoded.

    Raises:
        DataError: if images are unreadable.
    """
    size = size or config.image_size or distributed.on_first(lambda: default_size(contents.images))
    return FileSource(
        contents.images,
        contents.labels,
        size,
        class_names=contents.class_names,
        on_error=config.on_error,
        workers=config.workers,
        # Ranks share the decoding, so either all of them keep the images or none does.
        resident=all(distributed.gathered(config.keeps(len(contents.images), size))),
        scaled=config.decode == "scaled",
        interpolation=config.filter,
        identity=config.identity,
        problems=contents.problems,
        decode_cache=decode_cache,
    )


def open_contents(
    contents: Contents, config: DataConfig, *, size: int | None = None, decode_cache: DecodeCache | None = None
) -> Opened:
    """Open the images and split them: into the source's own splits, or by ``data.test_fraction``.

    Every image is checked before anything is held out, so that only readable ones count.

    Args:
        contents: the images of all splits.
        config: as in :func:`file_source`, and test_fraction.
        size: side of the square images; ``data.image_size`` by default, else chosen from the training images.
        decode_cache: images that an earlier start has decoded.

    Raises:
        DataError: if images are unreadable, or none of a split is readable.
    """
    size = (
        size
        or config.image_size
        or distributed.on_first(lambda: default_size(contents.images.select(_split(contents, config)[0])))
    )
    source = file_source(contents, config, size=size, decode_cache=decode_cache)
    if contents.test is None:
        return Opened(*held_out(source, config.test_fraction), None, contents.unused)
    own = {contents.images.names[row] for row in contents.test}
    train = [row for row, name in enumerate(source.paths) if name not in own]
    test = [row for row, name in enumerate(source.paths) if name in own]
    for split, rows, listed in (("training", train, len(contents.images) - len(own)), ("test", test, len(own))):
        if not rows:
            reasons = [entry for entry in source.skipped if (entry[0] in own) == (split == "test")]
            raise none_readable(listed, f"{split} images of {contents.images.root or config.source}", reasons)
    return Opened(
        SubsetSource(source, torch.tensor(train)), SubsetSource(source, torch.tensor(test)), None, contents.unused
    )


def _split(contents: Contents, config: DataConfig) -> tuple[list[int], list[int]]:
    if contents.test is None:
        return held_out_rows(contents.images.names, config.test_fraction)
    test = set(contents.test)
    return [row for row in range(len(contents.images)) if row not in test], sorted(test)


def held_out(source: Source, fraction: float) -> tuple[Source, Source | None]:
    """Split a source into training and held-out test images by a hash of each image's name.

    New images do not move the others.

    Args:
        source: the images.
        fraction: share to hold out; 0 for none, and then the test images are None.

    Raises:
        DataError: if one image is to be split.
    """
    if fraction == 0:
        return source, None
    if len(source) < 2:
        raise DataError(
            f"data.test_fraction={fraction:g} holds images out, but there is only {source.paths[0]}; "
            "add images, or set data.test_fraction=0"
        )
    train, test = held_out_rows(source.paths, fraction)
    return SubsetSource(source, torch.tensor(train)), SubsetSource(source, torch.tensor(test))
