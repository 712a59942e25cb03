"""Container files: patterns that select them, their splits, and labels as class numbers."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from .. import distributed
from ..errors import DataError
from .agreement import check_same, raise_first
from .folders import TEST_NAMES, TRAIN_NAMES

Label = int | str | None
T = TypeVar("T")

MOST_CHOICES = 100_000
"""Paths that braces may stand for."""
LONGEST_LIST = 16 << 20
"""Bytes of a text file with names, such as those of classes."""

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(pattern: str) -> list[str]:
    """Expand ``{000..012}`` and ``{a,b}`` as a shell does; a range keeps the width of a zero-padded start.

    Raises:
        DataError: if a range is descending, or there are more than :data:`MOST_CHOICES` paths.
    """
    total = 1
    for content in _BRACES.findall(pattern):
        limits = _RANGE.fullmatch(content)
        # The numbers of a range may have thousands of digits.
        count = content.count(",") + 1
        if limits is not None:
            long = max(len(limits[1]), len(limits[2])) > 12
            count = MOST_CHOICES + 1 if long else max(1, int(limits[2]) - int(limits[1]) + 1)
        total *= count
        if total > MOST_CHOICES:
            raise DataError(f"{pattern[:100]}: the braces stand for more than {MOST_CHOICES:,} paths")
    texts, end = [""], 0
    for found in _BRACES.finditer(pattern):
        choices = _choices(found[1], pattern)
        texts = [text + pattern[end : found.start()] + choice for text in texts for choice in choices]
        end = found.end()
    return [text + pattern[end:] for text in texts]


def _choices(content: str, pattern: str) -> list[str]:
    """Return the texts that the content of a pair of braces stands for; the pattern is for the error."""
    found = _RANGE.fullmatch(content)
    if found is None:
        return content.split(",")
    first, last = found[1], found[2]
    if int(first) > int(last):
        raise DataError(f"{pattern[:100]}: the range {{{content}}} is descending; write {{{last}..{first}}}")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


def read_list(file: Path, what: str) -> list[str]:
    """Return the lines of a text file that names things.

    Args:
        file: the file.
        what: what it is, for errors.

    Raises:
        DataError: if it is no text in UTF-8, or has more than :data:`LONGEST_LIST` bytes.
    """
    if (size := file.stat().st_size) > LONGEST_LIST:
        raise DataError(f"{what} has {size:,} bytes, and a list of names at most {LONGEST_LIST:,}")
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{what} is no text in UTF-8: {error}") from error


def find_files(pattern: str, root: Path | None, suffixes: Sequence[str]) -> list[str]:
    """Return the files that a pattern selects, sorted.

    Args:
        pattern: a file, a folder (all its files with one of the suffixes, at any depth), or a pattern with braces and
            wildcards (``*``, ``?``, ``[...]``, ``**``).
        root: folder that a relative pattern starts from; by default the working directory.
        suffixes: of the files in a folder.

    Raises:
        DataError: if a file is missing or nothing matches.
    """
    if "://" in pattern or pattern.startswith("pipe:"):
        raise DataError(f"{pattern}: only local files are read; download them first")
    try:
        os.fsencode(pattern)
    except UnicodeEncodeError as error:
        raise DataError(f"{pattern!a} cannot be the name of a file: {error.reason}") from error
    if "\0" in pattern:
        raise DataError(f"{pattern!a} cannot be the name of a file: it has a null character")
    found: set[str] = set()
    for choice in expand_braces(pattern):
        path = os.path.join("" if root is None else root.expanduser(), os.path.expanduser(choice))
        if os.path.isdir(path):
            folder = glob.escape(path)
            matches = [file for suffix in suffixes for file in glob.glob(f"{folder}/**/*{suffix}", recursive=True)]
        elif os.path.exists(path):
            matches = [path]
        else:
            matches = glob.glob(path, recursive=True)
        matches = [file for file in matches if os.path.isfile(file)]
        if not matches:
            if os.path.isdir(path):
                raise DataError(f"no files found in {path}: looked for {' '.join('*' + suffix for suffix in suffixes)}")
            raise DataError(f"{path} matches no file; check its folder, and the numbers in braces")
        found.update(matches)
    return sorted(found)


def common_folder(files: Sequence[str]) -> str:
    """Return the deepest folder that holds all files."""
    return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])


class SplitFiles(NamedTuple):
    """Container files by split.

    Attributes:
        train: the training files.
        test: the test files, or None.
        unused: those of a second held-out split, such as ``val`` if there is a ``test``.
    """

    train: list[str]
    test: list[str] | None
    unused: list[str]


def split_files(files: Sequence[str]) -> SplitFiles:
    """Split container files into train and test by name.

    A file belongs to the split that its name starts with, such as ``train-00000-of-00004.parquet``, or that a folder
    below the common one is called.

    Returns:
        All files are training files unless there are some of both splits.

    Raises:
        DataError: if there are files of both splits and others of neither.
    """
    root = common_folder(files)
    splits: dict[str | None, list[str]] = {}
    for file in files:
        *folders, name = os.path.relpath(os.path.abspath(file), root).lower().split(os.sep)
        words = [*folders, re.split(r"[-_.\d]", name)[0]]
        split = next((word for word in words if word in (*TRAIN_NAMES, *TEST_NAMES)), None)
        splits.setdefault(split, []).append(file)
    train = next((splits[name] for name in TRAIN_NAMES if name in splits), None)
    test = next((splits[name] for name in TEST_NAMES if name in splits), None)
    if train is None or test is None:
        return SplitFiles(list(files), None, [])
    if None in splits:
        raise DataError(
            f"{splits[None][0]} belongs to no split by its name, but {train[0]} to train and {test[0]} to test; "
            "select fewer files, or rename it"
        )
    used = {*train, *test}
    return SplitFiles(train, test, [file for file in files if file not in used])


def index_files(files: Sequence[str], index: Callable[[str], T]) -> list[T]:
    """Index container files, each on one rank, and return what all ranks have found, in the order of the files.

    Args:
        files: paths of the files; of the same names and sizes on all ranks.
        index: lists what a file holds; the result must be fit for a pickle.

    Raises:
        DataError: if the ranks have different files.
        Exception: on all ranks, what `index` raises for the first file for which it does.
    """
    if not distributed.several():
        return [index(file) for file in files]
    root = common_folder(files)
    check_same([f"{os.path.relpath(file, root)} ({os.path.getsize(file)} bytes)" for file in files], "files")
    found: list[T] = []
    problem = None
    begin, end = distributed.share(len(files))
    try:
        with distributed.alone():
            found = [index(file) for file in files[begin:end]]
    except Exception as error:
        problem = error
    raise_first(problem)
    return [each for part in distributed.gathered(found) for each in part]


def class_numbers(labels: Sequence[Label]) -> tuple[Tensor | None, list[str] | None]:
    """Number the distinct labels, in numeric order if all are integers (of at most 18 digits), else alphabetically.

    Returns:
        (N,) int64 class numbers and the name of each class; None and None unless every image has a label.
    """
    if not labels or None in labels:
        return None, None
    texts = [str(label) for label in labels]
    numeric = all(re.fullmatch(r"-?\d{1,18}", text) for text in texts)
    names = sorted(set(texts), key=int) if numeric else sorted(set(texts))
    rank = {name: number for number, name in enumerate(names)}
    return torch.tensor([rank[text] for text in texts], dtype=torch.int64), names
