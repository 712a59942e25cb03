"""Data sets that the Hugging Face library ``datasets`` opens, undecoded: from its Hub or from a local folder."""

from __future__ import annotations

import functools
import operator
import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...errors import DataError
from ..agreement import in_turn
from ..containers import Label, class_numbers
from ..encoded import Encoded, EncodedImages, Identity, file_identity
from ..folders import TEST_NAMES, TRAIN_NAMES
from .kind import ContainerKind, Contents
from .packages import optional_package, regular_file

if TYPE_CHECKING:
    from ..config import DataConfig


# The library has readers by other names too; one of them unpickles the file in older versions.
_READERS = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".json": "json", ".jsonl": "json"}
_IMAGE_DTYPES = ("binary", "large_binary", "string")


class HuggingFaceRows(EncodedImages):
    """Images in the rows of several splits of a data set.

    Args:
        parts: the data of each split.
        column: column of the images.
        splits: name of each split.
        name: name of the data set.
    """

    def __init__(self, parts: Sequence[Any], column: str, splits: Sequence[str], name: str) -> None:
        names = [f"{split} row {row}" for split, part in zip(splits, parts, strict=True) for row in range(len(part))]
        super().__init__(names, name)
        self._column = column
        self._parts = [_undecoded(part.with_format(None).select_columns([column]), column) for part in parts]
        self._starts = np.cumsum([0, *map(len, parts)])
        self._fingerprints = [part._fingerprint for part in parts]

    def encoded(self, index: int) -> Encoded:
        """Return the bytes in a row, or the path of the file that the row names."""
        part, row = self._place(index)
        value = self._parts[part][row][self._column]
        if isinstance(value, dict):
            value = value.get("path") if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("the row holds no image")
        return regular_file(value) if isinstance(value, str) else bytes(value)

    def identity(self, index: int) -> Identity:
        """Return the identity of the file that a row names; of a row with bytes, the data set's, with its number."""
        encoded = self.encoded(index)
        if isinstance(encoded, str):
            return file_identity(encoded, os.stat(encoded))
        part, row = self._place(index)
        return _row_identity(self._parts[part], self._fingerprints[part], row)

    def _place(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, index - int(self._starts[part])


def _undecoded(part: Any, column: str) -> Any:
    """Return a data set whose column yields bytes or paths instead of decoded images."""
    library = optional_package("datasets", "hf")
    if not isinstance(part.features[column], library.Image):
        return part
    return part.cast_column(column, library.Image(decode=False))


def _row_identity(part: Any, fingerprint: str, row: int) -> Identity:
    """Return the identity of a row of a data set with this fingerprint: that of all files that hold it together."""
    found = [file_identity(file["filename"], os.stat(file["filename"])) for file in part.cache_files]
    sizes, times, changes, inodes = zip(*(each.stamp for each in found), strict=True) if found else ((0,),) * 4
    inode = functools.reduce(operator.xor, inodes)
    return Identity(f"hf:{fingerprint}//row {row}", sum(sizes), max(times), max(changes), inode)


def _index(argument: str, config: DataConfig) -> Contents:
    """List the rows of the train and test splits, or of the splits that are named."""
    name, configuration, wanted = _split_argument(argument)
    if len(wanted) > 2:
        raise DataError(f"hf:{argument} names {len(wanted)} splits; name one, or two for train and test")
    found = in_turn(lambda: _load(name, configuration, wanted, config))
    name = _with_configuration(name, configuration)
    splits = wanted or _choose(found, name)
    parts = [found[split] for split in splits]
    image, label = _columns(parts[0].features, name)
    for split, part in zip(splits, parts, strict=True):
        if image not in part.features:
            raise DataError(f"hf:{name}: the split {split} lacks the column {image!r} of the others")
    rows = HuggingFaceRows(parts, image, splits, name)
    if not len(rows):
        raise DataError(f"hf:{argument} holds no images: its splits {', '.join(splits)} have no rows")
    numbers, names = _labels(parts, label) if config.labels == "auto" and label is not None else (None, None)
    test = range(len(parts[0]), len(rows)) if len(parts) == 2 else None
    return Contents(
        rows, numbers, names, test, unused=[] if wanted else [split for split in found if split not in splits]
    )


def _split_argument(argument: str) -> tuple[str, str | None, list[str]]:
    """Split ``DATASET[#CONFIGURATION][:SPLIT[:SPLIT]]`` into data set, configuration and splits.

    A colon in brackets, as in ``train[:10%]``, and both separators in an existing path stay.
    """
    if os.path.exists(os.path.expanduser(argument)):
        return argument, None, []
    name, *splits = re.split(r":(?![^\[\]]*\])", argument)
    if os.path.exists(os.path.expanduser(name)):
        return name, None, splits
    name, separator, configuration = name.partition("#")
    return name, configuration if separator else None, splits


def _absolute(argument: str) -> str:
    name, configuration, splits = _split_argument(argument)
    path = os.path.expanduser(name)
    data_set = os.path.abspath(path) if os.path.exists(path) else name
    return ":".join([_with_configuration(data_set, configuration), *splits])


def _with_configuration(name: str, configuration: str | None) -> str:
    return name if configuration is None else f"{name}#{configuration}"


def _load(name: str, configuration: str | None, wanted: Sequence[str], config: DataConfig) -> dict[str, Any]:
    """Open the wanted splits, by default all.

    Raises:
        DataError: if the data set or a split does not exist, or the library cannot read it.
    """
    library = optional_package("datasets", "hf")
    path = os.path.expanduser(name)
    data_set = _with_configuration(name, configuration)
    try:
        if os.path.isfile(os.path.join(path, "dataset_dict.json")) or os.path.isfile(os.path.join(path, "state.json")):
            if configuration is not None:
                raise ValueError("a saved data set has no configurations")
            saved = library.load_from_disk(path)
            found = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            missing = [split for split in wanted if split not in found]
            if missing:
                raise ValueError(f"there is no split {missing[0]!r}; its splits are {', '.join(found)}")
            return dict(found)
        options: dict[str, Any] = {"cache_dir": None if config.root is None else str(config.root.expanduser())}
        if not config.download:
            options["download_config"] = library.DownloadConfig(local_files_only=True)
        # Older versions run a Python file in the folder of a data set if they are not told otherwise.
        options["trust_remote_code"] = False
        if os.path.isfile(path):
            suffix = os.path.splitext(path)[1].lower()
            if suffix not in _READERS:
                raise ValueError(f"a single file must end in {', '.join(_READERS)}, got {suffix or 'no suffix'}")
            name, options["data_files"] = _READERS[suffix], path
        elif os.path.isdir(path):
            name = path
        if wanted:
            return dict(
                zip(wanted, library.load_dataset(name, configuration, split=list(wanted), **options), strict=True)
            )
        return dict(library.load_dataset(name, configuration, **options))
    except Exception as error:  # the library raises errors of many packages
        message = f"hf:{':'.join([data_set, *wanted])} cannot be opened: {type(error).__name__}: {error}"
        several = re.search(r"available configs: \['([^']+)'", str(error))
        if several is not None:
            message += f"\nName a configuration after #, such as hf:{data_set}#{several[1]}"
        raise DataError(message) from error


def _choose(found: dict[str, Any], name: str) -> list[str]:
    """Return the names of the train and test splits, or of the only split."""
    train = next((split for split in TRAIN_NAMES if split in found), None)
    test = next((split for split in TEST_NAMES if split in found), None)
    if train is not None:
        return [train] if test is None else [train, test]
    if len(found) == 1:
        return list(found)
    raise DataError(
        f"hf:{name} has no split train but {', '.join(found)}; name one or two, such as hf:{name}:{min(found)}"
    )


def _columns(features: Any, name: str) -> tuple[str, str | None]:
    """Return the columns of the images and of the labels.

    The images are in the column ``image``, of type Image, binary, string (a path) or a struct of bytes and path, or in
    the only column of type Image. The labels are in ``label`` or ``labels``, or in the first column of type ClassLabel.
    """
    library = optional_package("datasets", "hf")
    images = [column for column, feature in features.items() if isinstance(feature, library.Image)]
    classes = [column for column, feature in features.items() if isinstance(feature, library.ClassLabel)]
    label = next((column for column in ("label", "labels", *classes) if column in features), None)
    plain = features.get("image")
    holds_images = "bytes" in plain if isinstance(plain, dict) else getattr(plain, "dtype", "") in _IMAGE_DTYPES
    if "image" in images or holds_images:
        return "image", label
    if len(images) != 1:
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise DataError(f"hf:{name} must have a column image, or one column of type Image; it has {columns}")
    return images[0], label


def _labels(parts: Sequence[Any], column: str) -> tuple[Tensor | None, list[str] | None]:
    """Return the class numbers and names; None and None unless every row has a label, as -1 says that it has none."""
    values: list[Label] = []
    for part in parts:
        given = list(part[column]) if column in part.features else [None] * len(part)
        values += [
            value if isinstance(value, str) or (isinstance(value, int) and value >= 0) else None for value in given
        ]
    names = getattr(parts[0].features[column], "names", None)
    if names is None or None in values:
        return class_numbers(values)
    return torch.tensor(values, dtype=torch.int64), list(names)


HF = ContainerKind("hf", "DATASET[#CONFIGURATION][:SPLIT[:SPLIT]]", _index, _absolute)
