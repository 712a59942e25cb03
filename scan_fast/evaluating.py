"""Comparison of the clusters of images with their classes, for any model: numbers, tables and prototypes."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from . import distributed
from .data.sources import Source
from .errors import DataError, RunError, UsageError
from .evaluation.matching import Match
from .evaluation.metrics import clustering_metrics, confusion, metric_titles
from .predictor import Predictor
from .report.prototypes import find_prototypes, write_prototypes
from .runs.artifacts import ASSIGNMENTS
from .runs.tables import Confusion
from .runs.tracker import print_table
from .stages.pipeline import evaluate, print_summary
from .text import show
from .training.context import Context

MOST_CLASSES = 20
"""Largest number of classes whose confusion table is printed."""

MOST_CLUSTERS = 40
"""Number of clusters after which the printed table of their classes ends."""


@dataclass(frozen=True)
class Assessment:
    """The clusters of N images.

    Attributes:
        facts: the numbers of images, classes, clusters and clusters in use, the mean confidence and, with classes, what
            :func:`.evaluation.metrics.clustering_metrics` returns.
        class_names: the names of the classes; None without classes.
        match: the classes of the clusters; None likewise.
        confusion: the images by class; None likewise.
    """

    facts: dict[str, Any]
    class_names: list[str] | None
    match: Match | None
    confusion: Confusion | None

    @classmethod
    def of(cls, probabilities: Tensor, source: Source) -> Assessment:
        """Compare clusters with classes, if there are any.

        Args:
            probabilities: (N, K) float32, on the CPU.
            source: the N images.
        """
        confidence, clusters = probabilities.max(dim=1)
        n_clusters = probabilities.shape[1]
        facts: dict[str, Any] = {"images": len(source)}
        used = {"clusters_used": int(clusters.unique().numel()), "confidence": float(confidence.mean())}
        if source.labels is None or source.class_names is None or not bool((source.labels >= 0).any()):
            return cls(facts | {"clusters": n_clusters} | used, None, None, None)
        names, labels, assigned = list(source.class_names), source.labels.numpy(), clusters.numpy()
        match = Match.of(assigned, labels, n_clusters, len(names))
        counts = confusion(assigned, labels, n_clusters, len(names), match.classes)
        metrics = clustering_metrics(assigned, labels, n_clusters, len(names), probabilities.numpy())
        facts |= {"classes": len(names), "clusters": n_clusters, **used}
        facts |= {key: metrics[key] for key in metric_titles(metrics)}
        return cls(facts, names, match, Confusion.of(counts, names))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the facts and, with classes, ``match`` and ``confusion``."""
        found: dict[str, Any] = dict(self.facts)
        if self.match is not None and self.confusion is not None and self.class_names is not None:
            table = self.confusion
            found["match"] = self.match.to_dict(self.class_names)
            found["confusion"] = {
                "true": table.row_names,
                "assigned": table.column_names,
                "counts": table.counts.tolist(),
            }
        return found

    def show(self, title: str) -> None:
        """Print the facts, the class of each cluster and, for at most :data:`MOST_CLASSES` classes, the confusion."""
        named = metric_titles(self.facts)
        shown = {name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in self.facts.items()}
        print_table(
            title, ["", ""], [[named.get(name, name.replace("_", " ")), value] for name, value in shown.items()]
        )
        if self.match is None or self.confusion is None or self.class_names is None:
            return
        self._show_match(self.match, self.class_names)
        if len(self.class_names) <= MOST_CLASSES:
            self._show_confusion(self.confusion, len(self.class_names))

    def _show_match(self, match: Match, class_names: list[str]) -> None:
        columns = zip(match.names(class_names), match.images.tolist(), match.share.tolist(), strict=True)
        rows = [
            [str(number), name or "none", str(images), "" if math.isnan(share) else f"{share:.3f}"]
            for number, (name, images, share) in enumerate(columns)
        ]
        more = len(rows) - MOST_CLUSTERS
        if more > 0:
            rows = [*rows[:MOST_CLUSTERS], [f"{more} more: --json", "", "", ""]]
        print_table(f"classes of the clusters: {match.method}", ["cluster", "class", "images", "ACC inside"], rows)

    @staticmethod
    def _show_confusion(table: Confusion, n_classes: int) -> None:
        # Numbers instead of names above the columns, so that they fit on a screen.
        columns = ["", *(str(number) if number < n_classes else "none" for number in range(len(table.column_names)))]
        rows = [
            [f"{number} {name}", *map(str, counts)]
            for number, (name, counts) in enumerate(zip(table.row_names, table.counts.tolist(), strict=True))
        ]
        print_table("images by class (rows) and class of their cluster (columns)", columns, rows)


def evaluate_run(context: Context, *, as_json: bool, prototypes: Path | None = None) -> None:
    """Measure a run again, and print its stages and its final groups.

    Args:
        context: the run.
        as_json: print JSON instead of tables.
        prototypes: write one image for each cluster of the final stage to this PNG, and a table beside it.

    Raises:
        RunError: if prototypes are asked for and no stage with groups is finished.
    """
    run, tracker = context.run, context.tracker
    results = evaluate(context, features=prototypes is not None)
    content = results.summary.to_dict()
    if not as_json:
        print_summary(context, tracker)
    if results.outputs is None:
        if prototypes is not None:
            raise RunError(f"{run.path} has no groups yet; finish it first: scan-fast run {run.path}")
    else:
        source, probabilities = context.clustered[context.reported], results.outputs.logits.softmax(dim=1)
        found = Assessment.of(probabilities, source)
        content["final"] = {"stage": results.stage, "split": context.reported, **found.to_dict()}
        if not as_json:
            found.show(f"{results.stage}, {'images' if context.splits.test is None else 'test images'}")
        features = results.outputs.features
        if prototypes is not None and features is not None:
            names = run.group_names(run.read(ASSIGNMENTS)) if run.has(ASSIGNMENTS) else {}
            split = context.reported
            table = save_prototypes(prototypes, source, probabilities, features, found, split=split, names=names)
            tracker.say(f"prototypes: {prototypes}, {table}")
    if as_json:
        print(json.dumps(content, indent=2))


def show_evaluation(
    predictor: Predictor,
    source: Source,
    title: str,
    *,
    as_json: bool,
    prototypes: Path | None = None,
    further: Mapping[str, Any] | None = None,
) -> None:
    """Print how far the clusters of a source's images agree with their classes.

    Args:
        predictor: the model.
        source: the images.
        title: says which model and images these are.
        as_json: print JSON instead of tables.
        prototypes: write one image for each cluster to this PNG, and a table beside it. Images need no classes then.
        further: what else the JSON is to say.

    Raises:
        DataError: if the images have no classes and no prototypes are asked for.
    """
    if prototypes is None:
        check_classes(source, title)
    probabilities, features = predictor.outputs(source)
    found = Assessment.of(probabilities, source)
    if as_json:
        print(json.dumps({**found.to_dict(), **(further or {})}, indent=2))
    else:
        found.show(title)
    if prototypes is not None:
        table = save_prototypes(prototypes, source, probabilities, features, found)
        if not as_json:
            show(f"prototypes: {prototypes}, {table}")


def check_classes(source: Source, images: str) -> None:
    """Refuse images without classes.

    Args:
        source: the images.
        images: what they are called in the message.

    Raises:
        DataError: if they have none.
    """
    if source.labels is None or source.class_names is None:
        raise DataError(f"{images}: there are no classes to compare with; give a folder with a sub-folder for each")


def check_prototypes(file: Path | None) -> None:
    """Refuse a picture of prototypes that is no PNG, before anything is computed.

    Raises:
        UsageError: for another suffix, or a folder that is not there.
    """
    if file is None:
        return
    if file.suffix.lower() != ".png":
        raise UsageError(f"--prototypes: the picture is a PNG, with a table of the same name beside it; got {file}")
    if not file.expanduser().absolute().parent.is_dir():
        raise UsageError(f"--prototypes: there is no folder {file.parent}")


def save_prototypes(
    file: Path,
    source: Source,
    probabilities: Tensor,
    features: Tensor,
    assessment: Assessment,
    *,
    split: str = "",
    names: Mapping[int, str] | None = None,
) -> Path:
    """Write one image for each cluster as a PNG, and a table of the same name with the suffix .csv.

    Args:
        file: the picture.
        source: N images.
        probabilities: (N, K) float32, on the CPU.
        features: (N, D) float32, on the CPU.
        assessment: what :meth:`Assessment.of` returned for them.
        split: the split of a run that the source is.
        names: the names that a user gave to clusters.

    Returns:
        The path of the table. With several ranks, rank 0 writes it.
    """
    return distributed.on_first(
        lambda: _save_prototypes(file, source, probabilities, features, assessment, split, names)
    )


def _save_prototypes(
    file: Path,
    source: Source,
    probabilities: Tensor,
    features: Tensor,
    assessment: Assessment,
    split: str,
    names: Mapping[int, str] | None,
) -> Path:
    match, class_names = assessment.match, assessment.class_names
    class_of = None if match is None or class_names is None else match.names(class_names)
    found = find_prototypes(source, probabilities, features, class_of, split)
    return write_prototypes(file.expanduser(), source, found, probabilities.shape[1], names)
