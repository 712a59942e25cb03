"""Reads what a finished run left in its folder, as far as it is there."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

_LARGEST_EMBEDDINGS = 1 << 30  # bytes
_COLUMNS = ("path", "split", "cluster", "confidence", "margin")


@dataclass(frozen=True)
class Assignments:
    """The rows of ``assignments.csv`` as columns, N entries each.

    Attributes:
        paths: the images' paths or names.
        splits: the name of each image's split.
        rows: (N,) each image's row within its split.
        clusters: (N,) cluster ids.
        confidence: (N,) the probability of the image's cluster; NaN where the file has none.
        margin: (N,) the distance to the second most probable cluster's probability; NaN where there is none.
        labels: the true class of each image, empty where unknown; None without such a column.
    """

    paths: list[str]
    splits: list[str]
    rows: NDArray[np.int64]
    clusters: NDArray[np.int64]
    confidence: NDArray[np.float64]
    margin: NDArray[np.float64]
    labels: list[str] | None


@dataclass(frozen=True)
class Confusion:
    """``confusion.csv``: counts by true class (rows) and class of the assigned cluster (columns)."""

    row_names: list[str]
    column_names: list[str]
    counts: NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """One measured number over a stage: values at increasing epochs or steps."""

    name: str
    unit: str
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class RunFiles:
    """Everything that the report shows of a run; only the assignments are always there."""

    folder: Path
    assignments: Assignments
    config: dict[str, Any]
    config_text: str
    summary: dict[str, Any]
    series: dict[str, list[Series]] = field(default_factory=dict)
    confusion: Confusion | None = None
    confusion_image: Path | None = None
    embeddings: NDArray[np.float32] | None = None
    """(N, D) the image embeddings in the order of the assignments."""


def read_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Args:
        folder: with ``assignments.csv``, and, where present, ``config.yaml``, ``summary.json``, ``metrics.jsonl``,
            ``embeddings.npz``, ``confusion.csv`` and ``confusion.png``.

    Raises:
        FileNotFoundError: without ``assignments.csv``.
        ValueError: for a file that is not what its name says.
    """
    config_path, summary_path = folder / "config.yaml", folder / "summary.json"
    config_text = _text(config_path) if config_path.is_file() else ""
    try:
        config = yaml.safe_load(config_text) or {}
        summary = json.loads(_text(summary_path)) if summary_path.is_file() else {}
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"a file of the run {folder} cannot be read: {error}") from error
    if not isinstance(config, dict) or not isinstance(summary, dict):
        raise ValueError(f"config.yaml and summary.json of the run {folder} must hold mappings")
    picture = folder / "confusion.png"
    assignments = _read_assignments(folder / "assignments.csv")
    return RunFiles(
        folder=folder,
        assignments=assignments,
        config=config,
        config_text=config_text,
        summary=summary,
        series=_read_series(folder / "metrics.jsonl"),
        confusion=_read_confusion(folder / "confusion.csv"),
        confusion_image=picture if picture.is_file() else None,
        embeddings=_read_embeddings(folder / "embeddings.npz", assignments.splits),
    )


def flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their names joined by spaces: ``("test acc", 0.9)``."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _read_assignments(path: Path) -> Assignments:
    if not path.is_file():
        raise FileNotFoundError(f"the report needs {path}, which a finished clustering stage writes")
    paths: list[str] = []
    splits: list[str] = []
    labels: list[str] = []
    rows: list[int] = []
    clusters: list[int] = []
    scores: list[tuple[float, float]] = []
    seen: dict[str, int] = {}
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        missing = [name for name in _COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"{path} lacks the columns {', '.join(missing)}; it has {', '.join(columns) or 'none'}")
        for record in reader:
            try:
                clusters.append(int(record["cluster"]))
                scores.append((_number(record["confidence"]), _number(record["margin"])))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}, is no row of assignments: {error}") from error
            if clusters[-1] < 0:
                raise ValueError(f"{path}, line {reader.line_num}: cluster must not be negative, got {clusters[-1]}")
            split = record["split"]
            paths.append(record["path"])
            splits.append(split)
            labels.append(record.get("label") or "")
            rows.append(seen.get(split, 0))
            seen[split] = rows[-1] + 1
    score_array = np.array(scores, dtype=np.float64).reshape(-1, 2)
    return Assignments(
        paths=paths,
        splits=splits,
        rows=np.array(rows, dtype=np.int64),
        clusters=np.array(clusters, dtype=np.int64),
        confidence=score_array[:, 0],
        margin=score_array[:, 1],
        labels=labels if "label" in columns else None,
    )


def _read_embeddings(path: Path, splits: list[str]) -> NDArray[np.float32] | None:
    """One array per split, of which the rows are in the order of the assignments; None where they are of other images.

    They only decorate the page, so a large file, which would take long to read, is left alone.
    """
    if not splits or not path.is_file() or path.stat().st_size > _LARGEST_EMBEDDINGS:
        return None
    names = np.array(splits)
    with np.load(path, allow_pickle=False) as arrays:
        found = {split: arrays[split] for split in dict.fromkeys(splits) if split in arrays}
    if any(array.ndim != 2 or len(array) != (names == split).sum() for split, array in found.items()):
        return None
    if len(found) != len(set(splits)) or len({array.shape[1] for array in found.values()}) != 1:
        return None
    result = np.empty((len(splits), next(iter(found.values())).shape[1]), dtype=np.float32)
    for split, array in found.items():
        result[names == split] = array
    return result


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _read_series(path: Path) -> dict[str, list[Series]]:
    """Group the numbers of ``metrics.jsonl`` by stage and name; a line that a crash cut short is left out."""
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    lines = _text(path).splitlines() if path.is_file() else []
    for line in lines:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(record, dict) or "stage" not in record:
            continue
        stage = found.setdefault(str(record["stage"]), {})
        epoch, step = _finite(record.get("epoch")), _finite(record.get("step"))
        for name, value in flatten(record):
            if name not in ("stage", "epoch", "step", "time") and _is_number(value):
                stage.setdefault(name, []).append((epoch, step, float(value)))
    return {stage: [_series(name, points) for name, points in names.items()] for stage, names in found.items()}


def _series(name: str, points: list[tuple[float, float, float]]) -> Series:
    # Several points in an epoch are a curve over steps; otherwise the epoch says more. A resumed run repeats some
    # epochs or steps, of which the later line counts.
    epochs, steps = [p[0] for p in points], [p[1] for p in points]
    by_epoch = not any(map(math.isnan, epochs)) and (any(map(math.isnan, steps)) or len(set(epochs)) == len(set(steps)))
    if by_epoch:
        unit, curve = "epoch", {p[0]: p[2] for p in points}
    elif not any(map(math.isnan, steps)):
        unit, curve = "step", {p[1]: p[2] for p in points}
    else:
        unit, curve = "record", {float(i): p[2] for i, p in enumerate(points)}
    ordered = sorted(curve.items())
    return Series(name, unit, [x for x, _ in ordered], [y for _, y in ordered])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: Any) -> float:
    return float(value) if _is_number(value) and math.isfinite(value) else math.nan


def _read_confusion(path: Path) -> Confusion | None:
    if not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        table = [row for row in csv.reader(file) if row]
    try:
        counts = np.array([[float(cell) for cell in row[1:]] for row in table[1:]])
        if counts.ndim != 2 or counts.shape[1] != len(table[0]) - 1:
            raise ValueError("the rows are not all as long as the heading")
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} is no confusion matrix: {error}") from error
    return Confusion([row[0] for row in table[1:]], table[0][1:], counts)
