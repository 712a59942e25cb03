"""The tables of a run folder, each with its CSV form: assignments, skipped images and the confusion matrix."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..models.saved import MOST_CLUSTERS
from ..text import restored, written
from .csv_files import as_text, csv_writer, path_cell, path_of, text_cell, text_of

UNMATCHED = "(unmatched)"
"""The column of the images whose cluster has no class."""


@dataclass(frozen=True)
class Predictions:
    """The clusters of N images.

    Attributes:
        paths: the images' paths or names.
        clusters: (N,) cluster ids from 0.
        confidence: (N,) the probability of the image's cluster.
        margin: (N,) ``confidence`` minus the probability of the second most probable cluster.
        names: the names that a user gave to clusters, by id; kept in names.json, written along and not read back.
    """

    paths: Sequence[str]
    clusters: NDArray[np.int64]
    confidence: NDArray[np.float64]
    margin: NDArray[np.float64]
    names: Mapping[int, str] = field(default_factory=dict, kw_only=True)

    @classmethod
    def of(cls, paths: Sequence[str], probabilities: Tensor) -> Predictions:
        """Take the most probable cluster of each image.

        Args:
            paths: N names.
            probabilities: (N, K) with K of at least 2.
        """
        top, cluster = probabilities.topk(2, dim=1)
        best, second = top.double().unbind(dim=1)
        return cls(paths, cluster[:, 0].numpy(), best.numpy(), (best - second).numpy())

    def dump(self, file: BinaryIO) -> None:
        """Write one row per image: path, cluster, confidence, margin and, if clusters have names, name."""
        columns = self._name_column()
        with csv_writer(file) as writer:
            writer.writerow(("path", "cluster", "confidence", "margin", *columns))
            for row, *further in zip(_prediction_rows(self), *columns.values(), strict=True):
                writer.writerow((*row, *further))

    def _name_column(self) -> dict[str, list[str]]:
        if not self.names:
            return {}
        return {"name": [text_cell(self.names.get(cluster, "")) for cluster in self.clusters.tolist()]}

    def to_csv(self) -> str:
        """Return what :meth:`dump` writes."""
        buffer = io.BytesIO()
        self.dump(buffer)
        return buffer.getvalue().decode()


@dataclass(frozen=True)
class Placements(Predictions):
    """The clusters of N images that a model was not trained on.

    Attributes:
        similarity: (N,) cosine similarity to the nearest cluster's mean feature; None if the model has none.
        unlike: (N,) whether it is lower than that of nearly all training images of this cluster; None likewise.
    """

    similarity: NDArray[np.float32] | None
    unlike: NDArray[np.bool_] | None

    @classmethod
    def of_new(
        cls,
        paths: Sequence[str],
        probabilities: Tensor,
        similarity: NDArray[np.float32] | None,
        unlike: NDArray[np.bool_] | None,
    ) -> Placements:
        """Take the most probable cluster of each image; the arguments are those of :meth:`of` and the attributes."""
        return cls(**vars(Predictions.of(paths, probabilities)), similarity=similarity, unlike=unlike)

    def dump(self, file: BinaryIO) -> None:
        """Write one row per image: path, cluster, confidence, margin and, if known, name, similarity and unlike."""
        columns = self._name_column()
        if self.similarity is not None and self.unlike is not None:
            columns["similarity"] = [f"{value:.6f}" for value in self.similarity.tolist()]
            columns["unlike"] = [str(int(value)) for value in self.unlike.tolist()]
        with csv_writer(file) as writer:
            writer.writerow(("path", "cluster", "confidence", "margin", *columns))
            for row, *further in zip(_prediction_rows(self), *columns.values(), strict=True):
                writer.writerow((*row, *further))


@dataclass(frozen=True)
class Assignments(Predictions):
    """The clusters of all images of a run, split by split in the order of the embeddings.

    Attributes:
        splits: the split of each image, "train" or "test".
        labels: the true class of each image, empty if it is unknown; None if the images have no classes.
    """

    splits: Sequence[str]
    labels: Sequence[str] | None

    @classmethod
    def join(cls, parts: Mapping[str, Predictions], labels: Mapping[str, Sequence[str]] | None) -> Assignments:
        """Join the predictions and the labels of the splits."""
        splits = [split for split, part in parts.items() for _ in part.paths]
        return cls(
            [path for part in parts.values() for path in part.paths],
            np.concatenate([part.clusters for part in parts.values()]),
            np.concatenate([part.confidence for part in parts.values()]),
            np.concatenate([part.margin for part in parts.values()]),
            splits,
            None if labels is None else [label for split in parts for label in labels[split]],
        )

    @property
    def rows(self) -> NDArray[np.int64]:
        """(N,) each image's row within its split."""
        seen: dict[str, int] = {}
        rows = np.empty(len(self.splits), dtype=np.int64)
        for number, split in enumerate(self.splits):
            rows[number] = seen.get(split, 0)
            seen[split] = seen.get(split, 0) + 1
        return rows

    @property
    def digest(self) -> str:
        """A digest of the images and their clusters: the same if no image is in another cluster than before."""
        state = hashlib.blake2b(digest_size=16)
        for path, cluster in zip(self.paths, self.clusters.tolist(), strict=True):
            state.update(f"{path}\0{cluster}\0".encode(errors="surrogatepass"))
        return state.hexdigest()

    def _columns(self) -> dict[str, list[str]]:
        columns = {"split": list(map(text_cell, self.splits))}
        if self.labels is not None:
            columns["label"] = list(map(text_cell, self.labels))
        return columns | self._name_column()

    def dump(self, file: BinaryIO) -> None:
        """Write one row per image: path, cluster, confidence, margin, split; label with classes, name with names."""
        further = self._columns()
        with csv_writer(file) as writer:
            writer.writerow(("path", "cluster", "confidence", "margin", *further))
            for row, *columns in zip(_prediction_rows(self), *further.values(), strict=True):
                writer.writerow((*row, *columns))

    def dump_parquet(self, file: BinaryIO) -> None:
        """Write the same columns as Parquet; needs pyarrow."""
        import pyarrow
        import pyarrow.parquet

        # No spreadsheet opens Parquet, so nothing is taken for a formula.
        columns: dict[str, Any] = {"path": list(map(written, self.paths)), "cluster": self.clusters}
        columns |= {"confidence": self.confidence, "margin": self.margin, "split": list(map(written, self.splits))}
        if self.labels is not None:
            columns["label"] = list(map(written, self.labels))
        if self.names:
            columns["name"] = [written(self.names.get(cluster, "")) for cluster in self.clusters.tolist()]
        pyarrow.parquet.write_table(pyarrow.table(columns), file)

    @classmethod
    def load_parquet(cls, file: BinaryIO) -> Assignments:
        """Read what :meth:`dump_parquet` wrote.

        Raises:
            ValueError: for anything else.
        """
        import pyarrow
        import pyarrow.parquet

        known = {"path": pyarrow.string(), "cluster": pyarrow.int64(), "split": pyarrow.string()}
        known |= dict.fromkeys(("confidence", "margin"), pyarrow.float64())
        further = dict.fromkeys(("label", "name"), pyarrow.string())
        try:
            table = pyarrow.parquet.read_table(pyarrow.py_buffer(file.read()))
            columns = {
                name: table.column(name).cast(kind)
                for name, kind in {**known, **further}.items()
                if name in known or name in table.column_names
            }
        # A damaged file also raises plain errors of many classes, such as OSError for its metadata.
        except (pyarrow.ArrowException, KeyError, OSError, ValueError, TypeError, NotImplementedError) as error:
            raise ValueError(f"it is no table of assignments ({' '.join(str(error).split())})") from error
        if any(column.null_count for column in columns.values()):
            raise ValueError("it is no table of assignments: it has empty cells")
        cluster, confidence, margin = (columns[name].to_numpy() for name in ("cluster", "confidence", "margin"))
        if len(cluster) and not 0 <= cluster.min() <= cluster.max() < MOST_CLUSTERS:
            raise ValueError(f"clusters must be from 0 to {MOST_CLUSTERS - 1}, got {cluster.min()} to {cluster.max()}")
        texts = {name: list(map(restored, columns[name].to_pylist())) for name in _TEXTS if name in columns}
        names = {int(c): name for c, name in zip(cluster, texts.get("name", ()), strict=False) if name}
        return cls(texts["path"], cluster, confidence, margin, texts["split"], texts.get("label"), names=names)

    @classmethod
    def load(cls, file: BinaryIO) -> Assignments:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for a missing column or a damaged row.
        """
        table: dict[str, list[Any]] = {"path": [], "cluster": [], "confidence": [], "margin": [], "split": []}
        with as_text(file) as text:
            reader = csv.DictReader(text)
            found = reader.fieldnames or []
            missing = [name for name in table if name not in found]
            if missing:
                raise ValueError(f"it lacks the columns {', '.join(missing)}; it has {', '.join(found) or 'none'}")
            if "label" in found:
                table["label"] = []
            for record in reader:
                try:
                    for name, column in table.items():
                        column.append(_PARSERS.get(name, text_of)(_cell(record[name])))
                except ValueError as error:
                    raise ValueError(f"line {reader.line_num} is no row of assignments: {error}") from error
        return cls(
            table["path"],
            np.array(table["cluster"], dtype=np.int64),
            np.array(table["confidence"], dtype=np.float64),
            np.array(table["margin"], dtype=np.float64),
            table["split"],
            table.get("label"),
        )


@dataclass(frozen=True)
class Skipped:
    """The images that were left out because they cannot be read, as (path, reason)."""

    images: Sequence[tuple[str, str]]

    def dump(self, file: BinaryIO) -> None:
        """Write one row per image: path, reason."""
        with csv_writer(file) as writer:
            writer.writerow(("path", "reason"))
            writer.writerows((path_cell(path), text_cell(" ".join(reason.split()))) for path, reason in self.images)

    @classmethod
    def load(cls, file: BinaryIO) -> Skipped:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for a row that does not have two columns.
        """
        with as_text(file) as text:
            rows = list(csv.reader(text))[1:]
        return cls([(path_of(path), text_of(reason)) for path, reason in rows])


@dataclass(frozen=True)
class Confusion:
    """Counts of images by true class (rows) and class of the assigned cluster (columns).

    Attributes:
        row_names: the C classes.
        column_names: the C classes, and :data:`UNMATCHED` if some cluster has no class.
        counts: (C, C) or (C, C + 1) int64.
    """

    row_names: list[str]
    column_names: list[str]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, counts: ArrayLike, class_names: Sequence[str]) -> Confusion:
        """Name the rows and columns of what :func:`scan_fast.evaluation.metrics.confusion` returns.

        Raises:
            ValueError: if the shape of ``counts`` does not fit the number of names.
        """
        matrix = np.asarray(counts)
        n = len(class_names)
        if matrix.shape not in ((n, n), (n, n + 1)):
            raise ValueError(f"counts must be ({n}, {n}) or ({n}, {n + 1}) for {n} class names, got {matrix.shape}")
        return cls(list(class_names), [*class_names, UNMATCHED][: matrix.shape[1]], matrix)

    @property
    def shares(self) -> NDArray[np.float64]:
        """The counts divided by the sum of their row; an empty row stays zero."""
        return self.counts / np.maximum(self.counts.sum(axis=1, keepdims=True), 1)

    def dump(self, file: BinaryIO) -> None:
        """Write the counts with the names in the first row and column."""
        with csv_writer(file) as writer:
            writer.writerow(("true \\ assigned", *map(text_cell, self.column_names)))
            for name, row in zip(self.row_names, self.counts.tolist(), strict=True):
                writer.writerow((text_cell(name), *row))

    @classmethod
    def load(cls, file: BinaryIO) -> Confusion:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: if it is not a table of counts.
        """
        with as_text(file) as text:
            table = [row for row in csv.reader(text) if row]
        if len({len(row) for row in table}) != 1:
            raise ValueError("it is no confusion matrix: the rows differ in length, or there are none")
        counts = np.array([[_count(cell) for cell in row[1:]] for row in table[1:]], dtype=np.int64)
        names = [text_of(row[0]) for row in table[1:]]
        return cls(names, list(map(text_of, table[0][1:])), counts.reshape(-1, len(table[0]) - 1))


def _prediction_rows(table: Predictions) -> Iterator[tuple[Any, ...]]:
    columns = (table.clusters.tolist(), table.confidence.tolist(), table.margin.tolist())
    for path, cluster, confidence, margin in zip(table.paths, *columns, strict=True):
        yield path_cell(path), cluster, f"{confidence:.6f}", f"{margin:.6f}"


def _cell(cell: str | None) -> str:
    if cell is None:
        raise ValueError("a column is missing")
    return cell


def _cluster_id(cell: str) -> int:
    cluster = int(cell)
    if cluster < 0:
        raise ValueError(f"cluster must not be negative, got {cell[:40]}")
    if cluster >= MOST_CLUSTERS:
        raise ValueError(f"cluster must be below {MOST_CLUSTERS}")
    return cluster


def _count(cell: str) -> int:
    count = int(cell)
    if not 0 <= count < 1 << 63:
        raise ValueError("it is no confusion matrix: a count is negative or too large")
    return count


_TEXTS = ("path", "split", "label", "name")
_PARSERS: dict[str, Callable[[str], Any]] = {
    "path": path_of,
    "cluster": _cluster_id,
    "confidence": float,
    "margin": float,
}
