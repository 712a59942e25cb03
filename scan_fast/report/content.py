"""The artifacts of a run that its report shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ..runs import artifacts
from ..runs.config import Config
from ..runs.folder import RunFolder
from ..runs.records import Embeddings, Summary
from ..runs.tables import Assignments, Confusion
from .charts import Series, series_of

LARGEST_EMBEDDINGS = 1 << 30
"""In bytes. A larger file takes too long to read for the little that the report shows of it."""


@dataclass(frozen=True)
class Content:
    """Everything that the report shows of a run.

    Attributes:
        config: the configuration.
        assignments: the clusters of all images.
        summary: the results of the stages.
        series: the metrics over epochs, by stage.
        confusion: counts of true by assigned classes; None without labels, or if there are too many classes.
        confusion_figure: PNG, if there are too many classes.
        embeddings: (N, D), in the order of the assignments; None if there are none of these images.
        names: the names that the user gave to groups.
        skipped: (path, reason) of the images that could not be read.
        n_groups: the number of groups; the last ones may be empty.
    """

    config: Config
    assignments: Assignments
    summary: Summary
    series: dict[str, list[Series]]
    confusion: Confusion | None
    confusion_figure: bytes | None
    embeddings: NDArray[np.float32] | None
    names: dict[int, str]
    skipped: Sequence[tuple[str, str]]
    n_groups: int


def read_content(run: RunFolder, *, largest_confusion: int) -> Content:
    """Read a run folder; only the configuration and the assignments must be there.

    Args:
        run: the run folder.
        largest_confusion: take the confusion matrix of more classes as a picture.

    Raises:
        RunError: if the assignments are missing, or a file is damaged.
    """
    assignments = run.read(artifacts.ASSIGNMENTS)
    metrics = run.read(artifacts.METRICS) if run.has(artifacts.METRICS) else []
    confusion = run.read(artifacts.CONFUSION) if run.has(artifacts.CONFUSION) else None
    figure = None
    if confusion is not None and len(confusion.column_names) > largest_confusion:
        confusion = None
        figure = run.read(artifacts.CONFUSION_FIGURE) if run.has(artifacts.CONFUSION_FIGURE) else None
    embeddings = None
    path = run.path_of(artifacts.EMBEDDINGS)
    if path.is_file() and path.stat().st_size <= LARGEST_EMBEDDINGS:
        embeddings = _in_order(run.read(artifacts.EMBEDDINGS), assignments)
    return Content(
        config=run.read(artifacts.CONFIG),
        assignments=assignments,
        summary=_unsplit(run.read(artifacts.SUMMARY)) if run.has(artifacts.SUMMARY) else Summary(),
        series=series_of(metrics),
        confusion=confusion,
        confusion_figure=figure,
        embeddings=embeddings,
        names=run.group_names(assignments),
        skipped=run.read(artifacts.SKIPPED).images if run.has(artifacts.SKIPPED) else (),
        n_groups=run.n_groups(assignments),
    )


def _unsplit(summary: Summary) -> Summary:
    """Return the summary without the name of the split if all images are in one: metrics of "train" are of all."""
    if summary.reported == "test":
        return summary
    stages = {
        name: {key: value for key, value in entry.items() if key != "train"} | entry.get("train", {})
        for name, entry in summary.stages.items()
    }
    if "purity_at" in stages.get("mining", {}):
        stages["mining"]["purity_at"] = stages["mining"]["purity_at"].get("train", {})
    return replace(summary, stages=stages)


def _in_order(embeddings: Embeddings, table: Assignments) -> NDArray[np.float32] | None:
    """Return the embeddings in the order of the assignments, (N, D); None if they are of other images."""
    splits = np.array(table.splits)
    result: NDArray[np.float32] | None = None
    for split in dict.fromkeys(table.splits):
        rows, here = embeddings.rows.get(split), splits == split
        if rows is None or rows.ndim != 2 or len(rows) != here.sum():
            return None
        if result is None:
            result = np.empty((len(splits), rows.shape[1]), dtype=np.float32)
        if rows.shape[1] != result.shape[1]:
            return None
        result[here] = rows
    return result
