"""WebDataset: tar shards whose members with the same key, the path up to the first dot of its name, form a sample."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ...errors import DataError
from ..agreement import on_all
from ..containers import Label, class_numbers, common_folder, find_files, index_files, split_files
from ..encoded import EncodedImages, Identity, file_identity
from ..formats import IMAGE_SUFFIXES
from .kind import ContainerKind, Contents

if TYPE_CHECKING:
    from ..config import DataConfig


LONGEST_LABEL = 1 << 20
"""Bytes of a member with a label."""


class Member(NamedTuple):
    """A member of a tar file: its name, and the place of its bytes."""

    name: str
    offset: int
    size: int


class TarMembers(EncodedImages):
    """Images in uncompressed tar files, read in place.

    Args:
        shards: paths of the tar files.
        members: for each image, the number of its shard and the member.
        root: folder that the names of the shards are relative to.
    """

    def __init__(self, shards: Sequence[str], members: Sequence[tuple[int, Member]], root: str) -> None:
        short = [os.path.relpath(shard, root) for shard in shards]
        super().__init__([f"{short[shard]}: {member.name}" for shard, member in members], root)
        self._shards = list(shards)
        self._members = list(members)
        self.groups = np.array([shard for shard, _ in self._members], dtype=np.int64)

    def encoded(self, index: int) -> bytes:
        """Return the bytes of a member."""
        shard, member = self._members[index]
        with open(self._shards[shard], "rb", buffering=0) as file:
            return read_member(file.fileno(), member)

    def identity(self, index: int) -> Identity:
        """Return the identity of a member: its shard's, with its name."""
        shard, member = self._members[index]
        return file_identity(self._shards[shard], os.stat(self._shards[shard]), member.name)


def read_member(file: int, member: Member) -> bytes:
    """Read the bytes of a member from a file descriptor.

    Raises:
        OSError: if the tar file ends first.
    """
    # Memory is taken for as many bytes as are asked for, whatever the file has.
    there = max(0, os.fstat(file).st_size - member.offset)
    if member.size > there:
        raise OSError(f"the tar file ends after {there} of the {member.size} bytes")
    data = os.pread(file, member.size, member.offset)
    while 0 < len(data) < member.size:
        more = os.pread(file, member.size - len(data), member.offset + len(data))
        if not more:
            break
        data += more
    if len(data) < member.size:
        raise OSError(f"the tar file ends after {len(data)} of the {member.size} bytes")
    return data


class _Bounded(io.FileIO):
    """A file of which no more is read at once than it has: a header of a tar file may state any size."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read up to so many bytes, or all."""
        left = max(0, os.fstat(self.fileno()).st_size - self.tell())
        return super().read(left if size is None or size < 0 else min(size, left)) or b""

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Go to a place; to the end of the file if the place lies behind it."""
        end = os.fstat(self.fileno()).st_size
        return super().seek(min(offset, end) if whence == os.SEEK_SET else offset, whence)


class Shard(NamedTuple):
    """Content of a tar file: its images with their labels, and (name, reason) of the samples without a usable one."""

    images: list[Member]
    labels: list[Label]
    problems: list[tuple[str, str]]


def _index(argument: str, config: DataConfig) -> Contents:
    """List the images of all shards."""
    train, test, unused = on_all(lambda: split_files(find_files(argument, config.root, (".tar",))))
    shards = [*train, *(test or [])]
    root = common_folder(shards)
    labelled = config.labels == "auto"
    found = index_files(shards, lambda shard: _index_shard(shard, os.path.relpath(shard, root), labelled))
    members = [(number, image) for number, shard in enumerate(found) for image in shard.images]
    problems = [problem for shard in found for problem in shard.problems]
    if not members:
        raise DataError(
            f"no images found in {argument}: looked for members such as 0001.jpg in {len(shards)} tar files"
            + (f"; {': '.join(problems[0])}" if problems else "")
        )
    numbers, classes = class_numbers([label for shard in found for label in shard.labels])
    first_test = sum(len(shard.images) for shard in found[: len(train)])
    rows = None if test is None else range(first_test, len(members))
    names = [os.path.relpath(shard, root) for shard in unused]
    return Contents(TarMembers(shards, members, root), numbers, classes, rows, problems, names)


def _index_shard(path: str, short: str, labelled: bool) -> Shard:
    """List the images of one shard, whose short name goes to messages, and read their labels if wanted."""
    shard = Shard([], [], [])
    samples, reason = _list_shard(path)
    if reason is not None:
        shard.problems.append((short, reason))
    with open(path, "rb") as file:
        for key, sample in samples.items():
            images = _images(sample)
            if len(images) > 1:
                names = ", ".join(image.name for image in images)
                shard.problems.append((f"{short}: {key}", f"the sample has {len(images)} images: {names}"))
            elif images:
                try:
                    label = _label(sample, file.fileno()) if labelled else None
                except (OSError, ValueError, TypeError, RecursionError) as error:
                    shard.problems.append((f"{short}: {key}", f"its label cannot be read: {error}"))
                    continue
                shard.images.append(images[0])
                shard.labels.append(label)
    return shard


def _list_shard(shard: str) -> tuple[dict[str, dict[str, Member]], str | None]:
    """Return the members of each sample by extension, and the reason if the shard is damaged behind them."""
    samples: dict[str, dict[str, Member]] = {}
    reason = None
    try:
        with _Bounded(shard) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                folder, name = os.path.split(info.name)
                if not info.isreg() or info.issparse() or name.startswith((".", "__")):
                    continue
                key, _, extension = name.partition(".")
                sample = samples.setdefault(os.path.join(folder, key), {})
                if extension.lower() in sample:
                    raise DataError(f"{shard} holds {info.name} twice; write each member once")
                sample[extension.lower()] = Member(info.name, info.offset_data, info.size)
    except tarfile.TarError as error:
        if not samples and tarfile.is_tarfile(shard):
            raise DataError(f"{shard} is compressed; decompress it, as single members are read in any order") from error
        reason = f"{type(error).__name__}: {error}"
    return samples, reason


def _images(sample: dict[str, Member]) -> list[Member]:
    """Return the images of a sample: those with a plain extension (``jpg``), else with any (``seg.png``)."""
    plain = [member for extension, member in sample.items() if f".{extension}" in IMAGE_SUFFIXES]
    return plain or [m for extension, m in sample.items() if os.path.splitext(extension)[1] in IMAGE_SUFFIXES]


def _label(sample: dict[str, Member], file: int) -> Label:
    """Return the label in the member ``cls``, or under "label" or "cls" in ``json``; None if there is none."""
    for extension in ("cls", "json"):
        if extension not in sample:
            continue
        if sample[extension].size > LONGEST_LABEL:
            raise ValueError(f"{extension} has {sample[extension].size:,} bytes, and a label at most {LONGEST_LABEL:,}")
        text = read_member(file, sample[extension]).decode()
        content = {"cls": text.strip()} if extension == "cls" else json.loads(text)
        label = next((content[key] for key in ("label", "cls") if key in content), None)
        if isinstance(label, (int, str)) and label != "":
            return label
    return None


WEBDATASET = ContainerKind("webdataset", "SHARDS", _index)
