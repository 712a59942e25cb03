"""Registry of image sources, one file each: the values of ``data.source``."""

from __future__ import annotations

import difflib

from ...errors import DataError
from .cifar import CIFAR10, CIFAR20
from .digits import DIGITS
from .folder import FOLDER, IMAGENET
from .huggingface import HF
from .kind import ContainerKind, SourceKind, Triple
from .parquet import PARQUET
from .stl10 import STL10
from .tinyimagenet import TINYIMAGENET
from .webdataset import WEBDATASET

__all__ = ["SOURCES", "ContainerKind", "SourceKind", "Triple", "absolute_source", "find_kind", "is_prefixed"]

#: Every image source by its name or prefix.
SOURCES: dict[str, SourceKind | ContainerKind] = {
    kind.name: kind
    for kind in (
        DIGITS,
        CIFAR10,
        CIFAR20,
        STL10,
        TINYIMAGENET,
        FOLDER,
        IMAGENET,
        HF,
        WEBDATASET,
        PARQUET,
    )
}


def find_kind(source: str) -> SourceKind | ContainerKind:
    """Return the entry of ``NAME`` or ``PREFIX:ARGUMENT``.

    Raises:
        DataError: if there is none; the message says which name is nearest.
    """
    name, colon, argument = source.partition(":")
    kind = SOURCES.get(name)
    if kind is None:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.5)
        hint = f"; did you mean {_usage(SOURCES[near[0]])}?" if near else ""
        raise DataError(f"{source!r} is no image source; known are {', '.join(map(_usage, SOURCES.values()))}{hint}")
    if isinstance(kind, ContainerKind) and not argument:
        raise DataError(f"the source {name} needs an argument: {_usage(kind)}, got {source!r}")
    if isinstance(kind, SourceKind) and colon:
        raise DataError(f"the source {name} takes no argument, got {source!r}")
    return kind


def _usage(kind: SourceKind | ContainerKind) -> str:
    return f"{kind.name}:{kind.argument}" if isinstance(kind, ContainerKind) else kind.name


def is_prefixed(text: str) -> bool:
    """Return whether a text is ``PREFIX:ARGUMENT`` with the prefix of a source."""
    prefix, colon, _ = text.partition(":")
    return bool(colon) and isinstance(SOURCES.get(prefix), ContainerKind)


def absolute_source(source: str) -> str:
    """Make relative paths in ``PREFIX:ARGUMENT`` absolute.

    Raises:
        DataError: if the prefix is unknown or the argument is missing.
    """
    kind = find_kind(source)
    return f"{kind.name}:{kind.absolute(source.partition(':')[2])}" if isinstance(kind, ContainerKind) else source
