"""Several runs side by side: their results, on test images if there are any, and how far their clusters agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, BinaryIO

import numpy as np
from sklearn.metrics import adjusted_mutual_info_score

from ..evaluation.metrics import metric_titles
from .artifacts import ASSIGNMENTS, MODEL
from .csv_files import csv_writer, path_cell, text_cell
from .folder import RunFolder

_METRICS = ("confidence", "acc_many_to_one", "acc", "nmi", "ari", "ami")
BASELINES = {"kmeans_pixels": "k-means on pixels", "kmeans_features": "k-means on features"}


@dataclass(frozen=True)
class Result:
    """A row of the comparison: a stage of a run, or a baseline. None is not known.

    Attributes:
        run: the run, as it was named.
        result: the stage or baseline.
        clusters: K, the number of clusters asked for.
        used: the number of clusters that test images are in.
        confidence: mean probability of the test images' clusters.
        acc_many_to_one: accuracy if each cluster takes its most frequent class; of more clusters than classes only.
        acc, nmi, ari, ami: agreement with the classes of the test images; the accuracy is of a one-to-one matching.
        knn_acc: accuracy of a vote of the nearest training images by their labels, of the pretext stage only.
        seconds: time of the stage.
    """

    run: str
    result: str
    clusters: int | None = None
    used: int | None = None
    confidence: float | None = None
    acc_many_to_one: float | None = None
    acc: float | None = None
    nmi: float | None = None
    ari: float | None = None
    ami: float | None = None
    knn_acc: float | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Agreement:
    """Agreement of the final clusters of two runs.

    Attributes:
        first, second: the runs.
        images: number of images that are in both, by name.
        ami: adjusted mutual information of their clusters, at most 1; None for fewer than two images.
    """

    first: str
    second: str
    images: int
    ami: float | None


@dataclass(frozen=True)
class Comparison:
    """Results of several runs, and the agreement of each two of them that are finished."""

    runs: list[str]
    results: list[Result]
    agreements: list[Agreement]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "results": [asdict(result) for result in self.results],
            "agreement": [asdict(agreement) for agreement in self.agreements],
        }

    def dump_csv(self, file: BinaryIO) -> None:
        """Write one row per result; what is not known is empty."""
        with csv_writer(file) as writer:
            writer.writerow(field.name for field in fields(Result))
            for result in self.results:
                run, *cells = asdict(result).values()
                writer.writerow([path_cell(run), *(text_cell(c) if isinstance(c, str) else c for c in cells)])

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns and rows of the results, for the screen."""
        # Runs with more clusters than classes have both accuracies, the other runs one.
        both = any(result.acc_many_to_one is not None for result in self.results)
        titles = {"result": "result", "clusters": "K", "used": "used", "confidence": "conf."}
        titles |= metric_titles((*(["acc_many_to_one"] if both else []), "acc", "nmi", "ari", "ami"))
        if any(result.knn_acc is not None for result in self.results):
            titles["knn_acc"] = "kNN, by labels"
        rows = []
        for number, result in enumerate(self.results):
            repeated = number > 0 and self.results[number - 1].run == result.run
            seconds = "" if result.seconds is None else f"{result.seconds:.1f}"
            rows.append(["" if repeated else result.run, *(_cell(getattr(result, key)) for key in titles), seconds])
        return ["run", *titles.values(), "seconds"], rows

    def agreement_table(self) -> tuple[list[str], list[list[str]]]:
        """Return the columns and rows of the agreements, for the screen."""
        rows = [[each.first, each.second, str(each.images), _cell(each.ami)] for each in self.agreements]
        return ["run", "and", "images", "AMI"], rows


def compare(runs: Mapping[str, RunFolder]) -> Comparison:
    """Read the results of run folders.

    Args:
        runs: by name; unfinished ones have fewer rows.

    Raises:
        RunError: if a file of a run is damaged.
    """
    results = [result for name, run in runs.items() for result in _results(name, run)]
    clusters = {name: _clusters(run) for name, run in runs.items() if run.has(ASSIGNMENTS)}
    names = list(clusters)
    agreements = [_agreement(first, second, clusters) for i, first in enumerate(names) for second in names[i + 1 :]]
    return Comparison(list(runs), results, agreements)


def _results(name: str, run: RunFolder) -> Iterator[Result]:
    summary, n_clusters = run.summary(), run.n_clusters
    if n_clusters is None and run.has(MODEL):  # as many as classes
        n_clusters = run.read(MODEL).n_clusters
    if not summary.stages:
        yield Result(name, "nothing finished", n_clusters)
    for stage, entry in summary.stages.items():
        seconds = entry["seconds"]
        if summary.reported in entry:
            yield Result(name, stage, n_clusters, seconds=seconds, **_metrics(entry[summary.reported]))
            continue
        yield Result(name, stage, knn_acc=entry.get("knn_acc"), seconds=seconds)
    for baseline, metrics in (summary.baselines or {}).items():
        means = {key.removesuffix("_mean"): value for key, value in metrics.items() if key.endswith("_mean")}
        yield Result(name, BASELINES.get(baseline, baseline.replace("_", " ")), n_clusters, **_metrics(means))


def _metrics(found: Mapping[str, float]) -> dict[str, Any]:
    used = found.get("clusters_used")
    known = {key: found[key] for key in _METRICS if key in found}
    return {"used": None if used is None else round(used), **known}


def _clusters(run: RunFolder) -> dict[str, int]:
    table = run.read(ASSIGNMENTS)
    return dict(zip(table.paths, table.clusters.tolist(), strict=True))


def _agreement(first: str, second: str, clusters: Mapping[str, Mapping[str, int]]) -> Agreement:
    ours, theirs = clusters[first], clusters[second]
    shared = [path for path in ours if path in theirs]
    pairs = np.array([(ours[path], theirs[path]) for path in shared], dtype=np.int64).reshape(-1, 2)
    ami = float(adjusted_mutual_info_score(pairs[:, 0], pairs[:, 1])) if len(shared) > 1 else None
    return Agreement(first, second, len(shared), ami)


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
