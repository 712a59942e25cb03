"""The details of a run, for those who want to know how it went: scores, stages, curves, commands."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..runs.records import Summary
from .charts import Series, line_chart
from .text import duration, number, percent

CHARTS_PER_STAGE = 12
_METRIC_NAMES = {
    "acc_many_to_one": "accuracy, many to one",
    "acc": "accuracy",
    "acc_top5": "top-5 accuracy",
    "nmi": "NMI",
    "ari": "ARI",
    "ami": "AMI",
}
_FRACTIONS = ("acc", "nmi", "ari", "ami", "purity", "top5", "one", "confidence")
_PURITY = re.compile(r"^purity_at( \w+)? (\d+)$")
_OF_THE_OVERVIEW = ("choice", "suggested_k")
"""Results of a stage that the overview shows."""


def results(summary: Summary) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the scores of the last stage that has an accuracy: its name, and each score's name and value."""
    for stage, values in reversed(summary.stages.items()):
        leaves = [(name, value) for name, value in _flatten(values) if isinstance(value, int | float)]
        scores = [(name, value) for name, value in leaves if name.rsplit(" ", 1)[-1] == "acc"]
        if scores:
            split = scores[-1][0].removesuffix("acc")
            wanted = {n.removeprefix(split): v for n, v in leaves if n.startswith(split)}
            heading = f"{stage}, {split.strip()}" if split else stage
            shown = [(name, percent(wanted[key])) for key, name in _names(wanted).items()]
            return heading, [*shown, *_purity(summary, split.strip())]
    return None


def _names(found: Iterable[str]) -> dict[str, str]:
    """Return the names of the metrics that are there; with more clusters than classes the majority vote comes first."""
    keys = set(found)
    names = {key: name for key, name in _METRIC_NAMES.items() if key in keys}
    if "acc_many_to_one" in names and "acc" in names:
        names["acc"] = "accuracy, one to one"
    return names


def _purity(summary: Summary, split: str) -> list[tuple[str, str]]:
    """Return how many of the nearest neighbours have their image's class, for each number of neighbours in one card."""
    found = summary.stages.get("mining", {}).get("purity_at", {})
    by_k = found.get(split, {}) if split else found
    if not by_k:
        return []
    return [(f"neighbours of the same class, {', '.join(by_k)} nearest", ", ".join(map(percent, by_k.values())))]


def baselines(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return name and scores (mean and deviation over seeds) of each method that the run was compared with."""
    rows = []
    for name, values in (summary.baselines or {}).items():
        means = {key.removesuffix("_mean"): mean for key, mean in values.items() if key.endswith("_mean")}
        names = _names(means) | {key: key for key in means if key not in _METRIC_NAMES}
        cells = [
            (name, f"{percent(means[metric])} ± {percent(values.get(f'{metric}_std', 0.0))}")
            for metric, name in names.items()
        ]
        rows.append((name.replace("_", " "), cells))
    return rows


def stages(summary: Summary) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return name, duration and the other numbers of each stage."""
    rows = []
    for stage, values in summary.stages.items():
        cells = [
            (_PURITY.sub(r"purity at \2\1", name), percent(value) if _is_fraction(name, value) else number(value))
            for name, value in _flatten({key: v for key, v in values.items() if key not in _OF_THE_OVERVIEW})
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "seconds"
        ]
        rows.append((stage, duration(values["seconds"]), cells))
    return rows


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with their names joined by spaces: ``("test acc", 0.9)``."""
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", value


def charts(by_stage: Mapping[str, Sequence[Series]]) -> list[tuple[str, list[tuple[str, str, Markup]], int]]:
    """Return for each stage name, last value and drawing of its first series, and how many were left out."""
    result = []
    for stage, series in by_stage.items():
        drawn = [(s.name, number(s.y[-1]), chart) for s in series if (chart := line_chart(s)) is not None]
        if drawn:
            result.append((stage, drawn[:CHARTS_PER_STAGE], max(0, len(drawn) - CHARTS_PER_STAGE)))
    return result


def commands(folder: Path) -> list[tuple[str, str]]:
    """Return what to do next, and the command line for it."""
    run = shlex.quote(str(folder))
    return [
        ("Name a group", f"scan-fast name {run} 3 'red shoes'"),
        ("One folder per group, with links to the images", f"scan-fast folders {run} --out sorted/"),
        ("Sort new images into these groups", f"scan-fast predict {run} --data new_images/ --out groups.csv"),
        ("Write the features of images", f"scan-fast embed {run} --data new_images/ --out features.npz"),
        ("Measure again, with k-means for comparison", f"scan-fast evaluate {run}"),
        ("Try another number of groups", f"scan-fast cluster {run} --again --clusters 20"),
        ("… and then do what follows it", f"scan-fast run {run}"),
        ("Make this page again", f"scan-fast report {run}"),
        ("The page as one file, to be sent", f"scan-fast report {run} --single-file"),
    ]


def _is_fraction(name: str, value: Any) -> bool:
    parts = name.lower().replace(" ", "_").split("_")
    return isinstance(value, int | float) and -1 <= value <= 1 and any(part in _FRACTIONS for part in parts)
