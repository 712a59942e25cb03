"""Building of report.html from the artifacts of a run."""

from __future__ import annotations

import base64
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from numpy.typing import NDArray

from ..runs import artifacts
from ..runs.folder import RunFolder
from ..runs.records import Summary
from ..runs.tables import Assignments
from .charts import Series, line_chart, number
from .content import Content, read_content
from .thumbnails import Images, Thumbnail, choose, load

# With 24 thumbnails of about 4 kB each, the file stays around 5 MB.
CLUSTERS_WITH_IMAGES = 48
CHARTS_PER_STAGE = 12
CONFUSION_CLASSES = 40
"""A larger confusion matrix is shown as a picture."""
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
    """One cluster as the report shows it."""

    id: int
    size: int
    share: float
    confidence: float
    by_split: list[tuple[str, int]]
    label: tuple[str, float] | None
    nearest: list[tuple[int, float]]
    typical: list[Thumbnail] = field(default_factory=list)
    uncertain: list[Thumbnail] = field(default_factory=list)


def write_report(run: RunFolder, images: Images, *, title: str) -> Path:
    """Write report.html: one file without scripts or links to elsewhere.

    It shows the assignments and the configuration and, if they are there, the summary, the metrics, the confusion
    matrix, and how similar the clusters' mean embeddings are.

    Args:
        run: the run folder.
        images: ``images(split, rows)`` returns the pictures of these rows of a split. If it raises OSError or
            DataError, the pictures are requested one by one, and those that fail again are shown by their name.
        title: the heading.

    Returns:
        The path of the report.

    Raises:
        RunError: if the assignments are missing, or a file is damaged.
        ValueError: if ``images`` returns another number of pictures than requested.
    """
    content = read_content(run, largest_confusion=CONFUSION_CLASSES)
    clusters = _clusters(content)
    shown = sorted((c for c in clusters if c.size), key=lambda c: (-c.size, c.id))[:CLUSTERS_WITH_IMAGES]
    for cluster in shown:
        cluster.typical, cluster.uncertain = choose(content.assignments, cluster.id)
    load([t for c in shown for t in (*c.typical, *c.uncertain)], content.assignments, images)
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
        facts=_facts(content, clusters),
        results=_results(content.summary),
        warnings=_warnings(clusters, content.assignments),
        clusters=clusters,
        largest=max((c.share for c in clusters), default=0.0) or 1.0,
        shown=shown,
        linked={c.id for c in shown},
        n_filled=sum(c.size > 0 for c in clusters),
        labelled=any(c.label for c in clusters),
        stages=_stages(content.summary),
        baselines=_baselines(content.summary),
        charts=_charts(content.series),
        confusion=content.confusion,
        confusion_figure=_data_url(content.confusion_figure),
        config_text=content.config.to_yaml(),
        commands=_commands(run.path),
        made=datetime.fromtimestamp(run.path_of(artifacts.ASSIGNMENTS).stat().st_mtime, timezone.utc),
    )
    return run.write(artifacts.REPORT, page)


def _clusters(content: Content) -> list[ClusterView]:
    data = content.assignments
    wanted = content.config.clustering.n_clusters
    n_clusters = max(int(data.clusters.max(initial=-1)) + 1, wanted if isinstance(wanted, int) else 0)
    nearest = _nearest(content, n_clusters)
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
    known = Counter(label for i in members if (label := data.labels[i]))
    if not known:
        return None
    label, count = min(known.items(), key=lambda item: (-item[1], item[0]))
    return label, count / known.total()


def _nearest(content: Content, n_clusters: int) -> dict[int, list[tuple[int, float]]]:
    """Return for each cluster the three with the most similar mean embedding, and the cosine similarities."""
    if content.embeddings is None:
        return {}
    means = np.zeros((n_clusters, content.embeddings.shape[1]))
    for cluster in range(n_clusters):
        members = content.embeddings[content.assignments.clusters == cluster]
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


def _facts(content: Content, clusters: Sequence[ClusterView]) -> list[tuple[str, str]]:
    """Return name and value of the facts in the heading."""
    data, summary = content.assignments, content.summary
    facts = [("images", _count(len(data.paths)))]
    splits = Counter(data.splits)
    if len(splits) > 1:
        facts.append(("by split", ", ".join(f"{_count(n)} {name}" for name, n in splits.items())))
    facts.append(("clusters", _count(len(clusters))))
    if not np.isnan(data.confidence).all():
        facts.append(("mean confidence", _percent(float(np.nanmean(data.confidence)))))
    backbone = content.config.model.backbone
    if summary.backbone is not None:  # what an open choice of the configuration stands for
        backbone = str(summary.backbone["backbone"])
        facts.append(("weights", str(summary.backbone["weights"] or "random at first")))
        side = summary.backbone["image_size"]
        facts.append(("image size", f"{side} × {side}"))
    facts.append(("backbone", backbone))
    facts.append(("seed", str(content.config.seed)))
    if summary.stages:
        facts.append(("time", duration(summary.seconds)))
    return facts


def _results(summary: Summary) -> tuple[str, list[tuple[str, str]]] | None:
    """Return the scores of the last stage that has an accuracy: its name, and each score's name and value."""
    for stage, values in reversed(summary.stages.items()):
        leaves = [(name, value) for name, value in _flatten(values) if isinstance(value, int | float)]
        scores = [(name, value) for name, value in leaves if name.rsplit(" ", 1)[-1] == "acc"]
        if scores:
            split = scores[-1][0].removesuffix("acc")
            wanted = [(n.removeprefix(split), v) for n, v in leaves if n.startswith(split)]
            heading = f"{stage}, {split.strip()}" if split else stage
            return heading, [(_METRIC_NAMES[n], _percent(v)) for n, v in wanted if n in _METRIC_NAMES]
    return None


def _warnings(clusters: Sequence[ClusterView], data: Assignments) -> list[tuple[str, str]]:
    """Return what looks wrong, each with what to try."""
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


def _baselines(summary: Summary) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return name and scores (mean and deviation over seeds) of each method that the run was compared with."""
    rows = []
    for name, values in (summary.baselines or {}).items():
        cells = [
            (_METRIC_NAMES.get(metric, metric), f"{_percent(mean)} ± {_percent(values.get(f'{metric}_std', 0.0))}")
            for key, mean in values.items()
            if (metric := key.removesuffix("_mean")) != key
        ]
        rows.append((name.replace("_", " "), cells))
    return rows


def _ids(clusters: Sequence[int]) -> str:
    more = f" and {len(clusters) - 12} more" if len(clusters) > 12 else ""
    return ", ".join(f"#{cluster}" for cluster in clusters[:12]) + more


def _stages(summary: Summary) -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return name, duration and the other numbers of each stage."""
    rows = []
    for stage, values in summary.stages.items():
        cells = [
            (name, _percent(value) if _is_fraction(name, value) else number(value))
            for name, value in _flatten(values)
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


def _charts(by_stage: Mapping[str, Sequence[Series]]) -> list[tuple[str, list[tuple[str, str, Markup]], int]]:
    """Return for each stage name, last value and drawing of its first series, and how many were left out."""
    result = []
    for stage, series in by_stage.items():
        drawn = [(s.name, number(s.y[-1]), chart) for s in series if (chart := line_chart(s)) is not None]
        if drawn:
            result.append((stage, drawn[:CHARTS_PER_STAGE], max(0, len(drawn) - CHARTS_PER_STAGE)))
    return result


def _data_url(png: bytes | None) -> str:
    return "" if png is None else "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _commands(folder: Path) -> list[tuple[str, str]]:
    """Return what to do next, and the command line for it."""
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
