"""Builds ``report.html`` from a run folder."""

from __future__ import annotations

import base64
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from numpy.typing import NDArray

from .charts import line_chart, number
from .run_files import Assignments, Confusion, RunFiles, flatten, read_run
from .thumbnails import Images, Thumbnail, choose, load

# With 24 thumbnails of about 4 kB each, the file stays around 5 MB.
CLUSTERS_WITH_IMAGES = 48
CHARTS_PER_STAGE = 12
CONFUSION_CLASSES = 40
_METRIC_NAMES = {
    "acc": "accuracy",
    "acc_many_to_one": "accuracy, many to one",
    "acc_top5": "top-5 accuracy",
    "nmi": "NMI",
    "ari": "ARI",
    "ami": "AMI",
}
_FRACTIONS = ("acc", "nmi", "ari", "ami", "purity", "top5", "one", "confidence")


@dataclass
class ClusterView:
    """What the report says about one cluster."""

    id: int
    size: int
    share: float
    confidence: float
    by_split: list[tuple[str, int]]
    label: tuple[str, float] | None
    nearest: list[tuple[int, float]]
    typical: list[Thumbnail] = field(default_factory=list)
    uncertain: list[Thumbnail] = field(default_factory=list)


def write_report(folder: Path, images: Images, *, title: str) -> Path:
    """Write ``report.html`` into a run folder: one file without scripts or links to elsewhere.

    Read are ``assignments.csv`` (columns path, split, cluster, confidence, margin and optionally label) and, where
    present, ``config.yaml``, ``summary.json``, ``metrics.jsonl``, ``confusion.csv`` or ``confusion.png``, and
    ``embeddings.npz`` (one array per split), which tells how near clusters are to each other.

    Args:
        folder: the run folder.
        images: ``images(split, rows)`` returns the pictures of these rows of a split, counted in the order of the
            assignments. Where it raises an OSError, the pictures are asked for one by one, and those that fail again
            are shown by their name.
        title: the heading.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: without ``assignments.csv``.
        ValueError: for a damaged file, or where ``images`` returns another number of pictures than asked.
    """
    folder = Path(folder)
    run = read_run(folder)
    clusters = _clusters(run, _n_clusters(run))
    shown = sorted((c for c in clusters if c.size), key=lambda c: (-c.size, c.id))[:CLUSTERS_WITH_IMAGES]
    for cluster in shown:
        cluster.typical, cluster.uncertain = choose(run.assignments, cluster.id)
    load([t for c in shown for t in (*c.typical, *c.uncertain)], run.assignments, images)
    environment = Environment(
        loader=PackageLoader("scan_fast.report", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "percent": _percent, "count": _count}
    page = environment.get_template("report.html").render(
        title=title,
        facts=_facts(run, clusters),
        results=_results(run),
        warnings=_warnings(clusters, run.assignments),
        clusters=clusters,
        largest=max((c.share for c in clusters), default=0.0) or 1.0,
        shown=shown,
        linked={c.id for c in shown},
        n_filled=sum(c.size > 0 for c in clusters),
        labelled=any(c.label for c in clusters),
        stages=_stages(run),
        baselines=_baselines(run),
        charts=_charts(run),
        confusion=_confusion_view(run.confusion),
        confusion_image=_confusion_image(run),
        config_text=run.config_text,
        commands=_commands(folder),
        made=datetime.fromtimestamp((folder / "assignments.csv").stat().st_mtime, timezone.utc),
    )
    path = folder / "report.html"
    # Undecodable file names may hold lone surrogates, which UTF-8 cannot express.
    # Beside its name first: a report that is there is whole, which is how a run knows that it has come to its end.
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_bytes(page.encode("utf-8", errors="replace"))
    unfinished.replace(path)
    return path


def _n_clusters(run: RunFiles) -> int:
    """The configured number of clusters where it is known, else one more than the largest id."""
    found = int(run.assignments.clusters.max(initial=-1)) + 1
    leaves = {name.rsplit(" ", 1)[-1]: value for name, value in flatten(run.config)}
    configured = leaves.get("n_clusters")
    return max(found, configured) if isinstance(configured, int) and not isinstance(configured, bool) else found


def _clusters(run: RunFiles, n_clusters: int) -> list[ClusterView]:
    data, nearest = run.assignments, _nearest(run, n_clusters)
    total = max(1, data.clusters.size)
    split_names = list(dict.fromkeys(data.splits))
    order = np.argsort(data.clusters, kind="stable")
    bounds = np.searchsorted(data.clusters[order], np.arange(n_clusters + 1))
    views = []
    for cluster in range(n_clusters):
        members = order[bounds[cluster] : bounds[cluster + 1]]
        known = data.confidence[members]
        known = known[~np.isnan(known)]
        in_split = Counter(data.splits[i] for i in members)
        views.append(
            ClusterView(
                id=cluster,
                size=members.size,
                share=members.size / total,
                confidence=float(known.mean()) if known.size else math.nan,
                by_split=[(name, in_split[name]) for name in split_names] if len(split_names) > 1 else [],
                label=_main_label(data, members),
                nearest=nearest.get(cluster, []),
            )
        )
    return views


def _main_label(data: Assignments, members: NDArray[np.int64]) -> tuple[str, float] | None:
    if data.labels is None:
        return None
    known = Counter(label for i in members if (label := data.labels[i]) not in ("", "-1"))
    if not known:
        return None
    label, count = min(known.items(), key=lambda item: (-item[1], item[0]))
    return label, count / known.total()


def _nearest(run: RunFiles, n_clusters: int) -> dict[int, list[tuple[int, float]]]:
    """For each cluster the three with the most similar mean embedding, and the cosine similarity of the means."""
    if run.embeddings is None:
        return {}
    means = np.zeros((n_clusters, run.embeddings.shape[1]))
    for cluster in range(n_clusters):
        members = run.embeddings[run.assignments.clusters == cluster]
        if len(members):
            means[cluster] = members.mean(axis=0)
    length = np.linalg.norm(means, axis=1)
    # Empty clusters, and those whose members point everywhere or are not finite, are near to none.
    usable = np.flatnonzero((length > 1e-6) & np.isfinite(length))
    unit = means[usable] / length[usable, None]
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(3, usable.size - 1)]
    return {
        int(usable[row]): [(int(usable[column]), float(similarity[row, column])) for column in columns]
        for row, columns in enumerate(order)
    }


def _facts(run: RunFiles, clusters: Sequence[ClusterView]) -> list[tuple[str, str]]:
    """Name and value of the facts in the heading; what the run folder does not say is left out."""
    data = run.assignments
    leaves = {name.rsplit(" ", 1)[-1]: value for name, value in flatten(run.config)}
    facts = [("images", _count(len(data.paths)))]
    splits = Counter(data.splits)
    if len(splits) > 1:
        facts.append(("by split", ", ".join(f"{_count(n)} {name}" for name, n in splits.items())))
    facts.append(("clusters", _count(len(clusters))))
    if not np.isnan(data.confidence).all():
        facts.append(("mean confidence", _percent(float(np.nanmean(data.confidence)))))
    if isinstance(leaves.get("backbone"), str):
        facts.append(("backbone", leaves["backbone"]))
    seed = run.summary.get("seed", leaves.get("seed"))
    if seed is not None:
        facts.append(("seed", str(seed)))
    seconds = run.summary.get("seconds")
    if isinstance(seconds, int | float):
        facts.append(("time", duration(seconds)))
    return facts


def _results(run: RunFiles) -> tuple[str, list[tuple[str, str]]] | None:
    """The scores of the last stage that has an accuracy: its name, and each score's name and value."""
    for stage, values in reversed(list(_stage_items(run))):
        leaves = [(name, value) for name, value in flatten(values) if isinstance(value, int | float)]
        scores = [(name, value) for name, value in leaves if name.rsplit(" ", 1)[-1] == "acc"]
        if scores:
            split = scores[-1][0].removesuffix("acc")
            wanted = [(n.removeprefix(split), v) for n, v in leaves if n.startswith(split)]
            where = f"{stage}, {split.strip()}" if split else stage
            return where, [(_METRIC_NAMES[n], _percent(v)) for n, v in wanted if n in _METRIC_NAMES]
    return None


def _warnings(clusters: Sequence[ClusterView], data: Assignments) -> list[tuple[str, str]]:
    """What looks wrong, each with what to try."""
    found = []
    empty = [c.id for c in clusters if c.size == 0]
    if empty:
        found.append(
            (
                f"{len(empty)} of {len(clusters)} clusters {'is' if len(empty) == 1 else 'are'} empty: {_ids(empty)}.",
                "Ask for fewer clusters, or give the entropy term more weight (clustering.objective.entropy_weight).",
            )
        )
    tiny = [c.id for c in clusters if 0 < c.share < 0.1 / len(clusters)]
    if tiny:
        found.append(
            (
                f"{len(tiny)} of {len(clusters)} clusters {'has' if len(tiny) == 1 else 'have'} less than a tenth of "
                f"an even share: {_ids(tiny)}.",
                "Rare groups look like this, and so does a clustering stage that has not trained long enough.",
            )
        )
    limit = 0.9 if len(clusters) < 4 else min(0.5, 4 / len(clusters))
    for cluster in clusters:
        if cluster.size and cluster.share > limit:
            found.append(
                (
                    f"Cluster #{cluster.id} holds {_percent(cluster.share)} of the images.",
                    "If these images are not alike, train the pretext stage longer, ask for more clusters, or give the "
                    "entropy term more weight (clustering.objective.entropy_weight).",
                )
            )
    if clusters and not np.isnan(data.confidence).all():
        chance = 1 / len(clusters)
        mean = float(np.nanmean(data.confidence))
        if len(clusters) > 1 and mean < chance + 0.1 * (1 - chance):
            found.append(
                (
                    f"The mean confidence is {_percent(mean)}, hardly more than an even guess ({_percent(chance)}).",
                    "The clusters are not settled: train the clustering stage longer or with a higher learning rate.",
                )
            )
    return found


def _baselines(run: RunFiles) -> list[tuple[str, list[tuple[str, str]]]]:
    """Name and scores (mean and deviation over seeds) of each method that the run was compared with."""
    found = run.summary.get("baselines")
    rows = []
    for name, values in found.items() if isinstance(found, dict) else ():
        if not isinstance(values, dict):
            continue
        cells = [
            (_METRIC_NAMES.get(metric, metric), f"{_percent(mean)} ± {_percent(values.get(f'{metric}_std', 0.0))}")
            for key, mean in values.items()
            if (metric := key.removesuffix("_mean")) != key and isinstance(mean, int | float)
        ]
        rows.append((str(name).replace("_", " "), cells))
    return rows


def _ids(clusters: Sequence[int]) -> str:
    more = f" and {len(clusters) - 12} more" if len(clusters) > 12 else ""
    return ", ".join(f"#{cluster}" for cluster in clusters[:12]) + more


def _stage_items(run: RunFiles) -> list[tuple[str, dict[str, Any]]]:
    stages = run.summary.get("stages")
    items = stages.items() if isinstance(stages, dict) else ()
    return [(str(name), values) for name, values in items if isinstance(values, dict)]


def _stages(run: RunFiles) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Name, duration and the other numbers of each stage."""
    rows = []
    for stage, values in _stage_items(run):
        seconds = values.get("seconds")
        cells = [
            (name, _percent(value) if _is_fraction(name, value) else number(value))
            for name, value in flatten(values)
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "seconds"
        ]
        rows.append((stage, duration(seconds) if isinstance(seconds, int | float) else "", cells))
    return rows


def _charts(run: RunFiles) -> list[tuple[str, list[tuple[str, str, Markup]], int]]:
    """For each stage: name, last value and drawing of its first series, and how many were left out."""
    result = []
    for stage, series in run.series.items():
        drawn = [(s.name, number(s.y[-1]), chart) for s in series if (chart := line_chart(s)) is not None]
        if drawn:
            result.append((stage, drawn[:CHARTS_PER_STAGE], max(0, len(drawn) - CHARTS_PER_STAGE)))
    return result


def _confusion_view(matrix: Confusion | None) -> Confusion | None:
    return matrix if matrix is not None and len(matrix.column_names) <= CONFUSION_CLASSES else None


def _confusion_image(run: RunFiles) -> str:
    if _confusion_view(run.confusion) is not None or run.confusion_image is None:
        return ""
    return "data:image/png;base64," + base64.b64encode(run.confusion_image.read_bytes()).decode("ascii")


def _commands(folder: Path) -> list[tuple[str, str]]:
    """What to do next, and the command line for it."""
    run = shlex.quote(str(folder))
    return [
        ("Sort new images into these clusters", f"scan-fast predict {run} --data new_images/ --out clusters.csv"),
        ("Write the features of images", f"scan-fast embed {run} --data new_images/ --out features.npz"),
        ("Measure again, with k-means for comparison", f"scan-fast evaluate {run}"),
        ("Try another number of clusters", f"scan-fast cluster {run} --again --clusters 20"),
        ("… and then do what follows it", f"scan-fast run {run}"),
        ("Make this page again", f"scan-fast report {run}"),
    ]


def _is_fraction(name: str, value: Any) -> bool:
    parts = name.lower().replace(" ", "_").split("_")
    return isinstance(value, int | float) and -1 <= value <= 1 and any(part in _FRACTIONS for part in parts)


def _percent(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}\u202f%"


def _count(value: int) -> str:
    return f"{value:,}".replace(",", "\u202f")


def duration(seconds: float) -> str:
    """Write a time span: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 07 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
