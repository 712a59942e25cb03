"""Parquet files with encoded images in a column: binary, or a struct of ``bytes`` and ``path``."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ... import distributed
from ...errors import DataError
from ..agreement import on_all
from ..containers import Label, class_numbers, common_folder, find_files, index_files, split_files
from ..encoded import Encoded, EncodedImages, Identity, file_identity
from ..placement import free_memory
from .kind import ContainerKind, Contents
from .packages import optional_package, regular_file

if TYPE_CHECKING:
    from ..config import DataConfig

_LARGEST_SHARE = 1 / 4
"""Share of the free memory of the machine that one row group may take."""
_ALWAYS = 1 << 30
"""Bytes that a row group, and all labels of a file, may take in any case."""
_LONGEST_LABEL = 1024
_ALWAYS_PATHS = 1 << 20
_LONGEST_PATH = 4096
_ROWS_AT_ONCE = 16
_KEPT_GROUPS = 8
"""Number of row groups whose images stay in memory in any case."""
_KEPT_SHARE = 1 / 8
"""Share of the free memory of the machine that further row groups may take, for all its processes together."""


class ParquetRows(EncodedImages):
    """Images in the rows of Parquet files; the row groups that were used last are kept in memory, as many as fit.

    Args:
        files: paths of the files.
        footers: metadata of each file.
        column: name of the column with the images.
        root: folder that the names of the files are relative to.
    """

    def __init__(self, files: Sequence[str], footers: Sequence[Any], column: str, root: str) -> None:
        short = [os.path.relpath(file, root) for file in files]
        counts = [footer.num_rows for footer in footers]
        names = [f"{name} row {row}" for name, count in zip(short, counts, strict=True) for row in range(count)]
        super().__init__(names, root)
        self._parquet = optional_package("pyarrow.parquet", "parquet")
        self._files = list(files)
        self._footers = list(footers)
        self._column = column
        groups = [(f, g) for f, footer in enumerate(footers) for g in range(footer.num_row_groups)]
        self._groups = groups
        sizes = [footers[f].row_group(g).num_rows for f, g in groups]
        self._group_starts = np.cumsum([0, *sizes])
        self.groups = np.repeat(np.arange(len(groups), dtype=np.int64), sizes)
        self._bytes = [footers[f].row_group(g).total_byte_size for f, g in groups]
        self._have_paths = [f"{column}.path" in _column_names(footer) for footer in footers]
        self._paths: dict[int, Any] = {}
        self._limit = _KEPT_SHARE * free_memory() / distributed.current().local_world
        self._held = 0
        self._file_starts = np.cumsum([0, *counts])
        self._kept: OrderedDict[int, Future[Any]] = OrderedDict()
        self._lock = threading.Lock()

    def encoded(self, index: int) -> Encoded:
        """Return the bytes in a row, or the path of the file that the row names."""
        group, row = self._place(index)
        value = self._rows(group)[row].as_py()
        data, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if data is not None:
            return bytes(data)
        if path is None:
            raise ValueError("the row holds no image")
        return regular_file(self._beside(group, path))

    def identity(self, index: int) -> Identity:
        """Return the identity of a row: its file's, with its number; of a row that names another file, that one's."""
        if self._may_name_a_file(index):
            encoded = self.encoded(index)
            if isinstance(encoded, str):
                return file_identity(encoded, os.stat(encoded))
        file = int(np.searchsorted(self._file_starts, index, side="right")) - 1
        path = self._files[file]
        return file_identity(path, os.stat(path), f"row {index - int(self._file_starts[file])}")

    def _may_name_a_file(self, index: int) -> bool:
        """Return whether a row has the path of a file that exists. Its bytes, which come first, are not read.

        Arrow's statistics would tell whether bytes are missing, but asking for damaged ones ends the process.
        """
        group, row = self._place(index)
        file, number = self._groups[group]
        if not self._have_paths[file]:
            return False
        if group not in self._paths:
            footer = self._footers[file]
            limit = _ALWAYS_PATHS + footer.row_group(number).num_rows * _LONGEST_PATH
            with self._parquet.ParquetFile(self._files[file], metadata=footer) as reader:
                self._paths[group] = _decoded(reader, number, f"{self._column}.path", limit)
        value = self._paths[group][row].as_py()
        path = value.get("path") if isinstance(value, dict) else None
        return isinstance(path, str) and os.path.exists(self._beside(group, path))

    def _place(self, index: int) -> tuple[int, int]:
        """Return the row group of an image, and its row in there."""
        group = int(np.searchsorted(self._group_starts, index, side="right")) - 1
        return group, index - int(self._group_starts[group])

    def _beside(self, group: int, path: str) -> str:
        """Return a path that a row names, relative to the file of its row group."""
        return os.path.join(os.path.dirname(self._files[self._groups[group][0]]), path)

    def _rows(self, group: int) -> Any:
        """Return the image column of a row group; threads that ask for the same one wait for one reader."""
        with self._lock:
            future = self._kept.pop(group, None)
            reads = future is None
            if future is None:
                future = Future()
                self._held += self._bytes[group]
                while len(self._kept) >= _KEPT_GROUPS and self._held > self._limit:
                    self._held -= self._bytes[self._kept.popitem(last=False)[0]]
            self._kept[group] = future
        if reads:
            try:
                file, number = self._groups[group]
                with self._parquet.ParquetFile(self._files[file], metadata=self._footers[file]) as reader:
                    limit = max(_ALWAYS, free_memory() * _LARGEST_SHARE)
                    rows = _decoded(reader, number, self._column, limit)
                with self._lock:
                    # What the file says of it may be another size.
                    if self._kept.get(group) is future:
                        self._held += rows.nbytes - self._bytes[group]
                    self._bytes[group] = rows.nbytes
                future.set_result(rows)
            except BaseException as error:
                with self._lock:
                    if self._kept.get(group) is future:
                        del self._kept[group]
                        self._held -= self._bytes[group]
                future.set_exception(error)
        return future.result()


def _column_names(footer: Any) -> list[str]:
    """Return the names of the columns of a file, each with those that it is in.

    Raises:
        DataError: if the file is damaged.
    """
    try:
        return [footer.schema.column(place).path for place in range(len(footer.schema))]
    except UnicodeDecodeError as error:
        raise DataError(f"a column of a Parquet file has a damaged name ({error}); write the file again") from error


def _decoded(reader: Any, group: int, column: str, limit: float) -> Any:
    """Return a column of a row group. A value that is stored once and named in each row takes its size in each.

    Raises:
        ValueError: if it takes more than `limit` bytes.
    """
    pyarrow = optional_package("pyarrow", "parquet")
    arrays, size = [], 0
    for batch in reader.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], columns=[column]):
        arrays.append(batch.column(0))
        size += batch.nbytes
        if size > limit:
            raise ValueError(
                f"the column {column} of its row group takes more than {limit:,.0f} bytes of memory; "
                "write smaller row groups"
            )
    return pyarrow.concat_arrays(arrays) if arrays else pyarrow.array([])


class File(NamedTuple):
    """Content of a Parquet file: its metadata, the column of its images, and their labels."""

    footer: Any
    column: str
    labels: list[Label]


def _index(argument: str, config: DataConfig) -> Contents:
    """List the rows of all files."""
    on_all(lambda: optional_package("pyarrow.parquet", "parquet"))
    train, test, unused = on_all(lambda: split_files(find_files(argument, config.root, (".parquet",))))
    files = [*train, *(test or [])]
    found = index_files(files, lambda file: _index_file(file, config.labels == "auto"))
    column = found[0].column
    for file, own in zip(files, found, strict=True):
        if own.column != column:
            raise DataError(f"{file} has its images in the column {own.column!r}, {files[0]} in {column!r}")
    footers = [own.footer for own in found]
    images = ParquetRows(files, footers, column, common_folder(files))
    if not len(images):
        raise DataError(f"no images found in {argument}: its {len(files)} files have no rows")
    numbers, names = class_numbers([label for own in found for label in own.labels])
    first_test = sum(footer.num_rows for footer in footers[: len(train)])
    rows = None if test is None else range(first_test, len(images))
    return Contents(images, numbers, names, rows, unused=[os.path.relpath(file, images.root) for file in unused])


def _index_file(file: str, labelled: bool) -> File:
    """Read the metadata of one file, and the labels if wanted."""
    parquet = optional_package("pyarrow.parquet", "parquet")
    try:
        with parquet.ParquetFile(file) as reader:
            rows, size = reader.metadata.num_rows, os.path.getsize(file)
            if rows > size:
                raise DataError(f"{file} is said to have {rows:,} rows, in {size:,} bytes: it is no table of images")
            groups = [reader.metadata.row_group(group).num_rows for group in range(reader.metadata.num_row_groups)]
            if min(groups, default=0) < 0 or sum(groups) != rows:
                raise DataError(f"{file} is said to have {rows:,} rows, its row groups {sum(groups):,}; write it again")
            column = image_column(reader.schema_arrow, file)
            return File(reader.metadata, column, _labels(reader) if labelled else [])
    except DataError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own errors derive from these
        raise DataError(f"{file} cannot be read as Parquet: {error}") from error


def image_column(schema: Any, file: str) -> str:
    """Return the column named ``image``, or the only one of a type that may hold encoded images.

    Raises:
        DataError: if there is no such column, or several.
    """
    types = optional_package("pyarrow.types", "parquet")

    def binary(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def holds_images(kind: Any) -> bool:
        if types.is_struct(kind):
            at = kind.get_field_index("bytes")
            return at >= 0 and binary(kind.field(at).type)
        return binary(kind)

    columns = [field.name for field in schema if holds_images(field.type)]
    if "image" in columns:
        return "image"
    if len(columns) != 1:
        all_columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise DataError(
            f"{file} must have a column image of type binary or struct<bytes: binary, path: string>, "
            f"or one such column of another name; it has {all_columns}"
        )
    return str(columns[0])


def _labels(reader: Any) -> list[Label]:
    """Return the column ``label`` of integers or strings; a label for each row, None if it is missing or null."""
    rows = reader.metadata.num_rows
    if "label" not in reader.schema_arrow.names:
        return [None] * rows
    labels: list[Label] = []
    size = 0
    for batch in reader.iter_batches(columns=["label"]):
        size += batch.nbytes
        if size > _ALWAYS + rows * _LONGEST_LABEL:
            raise ValueError(f"its labels have more than {_LONGEST_LABEL} bytes each")
        labels += [value if isinstance(value, (int, str)) else None for value in batch.column(0).to_pylist()]
    return labels


PARQUET = ContainerKind("parquet", "GLOB", _index)
