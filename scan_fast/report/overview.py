"""The overview of a run: facts, groups and warnings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.prototypes import prototypes
from ..runs.names import title
from ..runs.tables import Assignments
from .content import Content
from .findings import Findings
from .text import count, duration, number, percent

STRIP_IMAGES = 10
"""Images shown beside a group in the overview."""
_COLORS = (
    *("#2f7ed8", "#e8702a", "#2fa36b", "#d64550", "#8a63d2", "#a0713a", "#e37fb5", "#7a8791", "#b5a81e", "#1fa9b8"),
    *("#5566dd", "#f2a65a", "#86c26a", "#a83a68", "#b79df0", "#c98b6b", "#c02fa7", "#ff5d8f", "#7d8f1a", "#7fcde0"),
)
CONFIDENT_MARGIN = 0.5
FEW_CONFIDENT = 0.2


@dataclass
class Group:
    """One group as the overview shows it.

    Attributes:
        id: its number.
        title: its name, or ``group 3``.
        named: whether the user has named it.
        size: number of images.
        share: of all images.
        confidence: mean confidence, NaN if unknown.
        by_split: number of images by split, if there are several.
        label: the most frequent label and its share of the labelled images.
        nearest: the groups with the most similar mean embeddings, and the similarities.
        strip: images that show it, as numbers in the assignments.
    """

    id: int
    title: str
    named: bool
    size: int
    share: float
    confidence: float
    by_split: list[tuple[str, int]]
    label: tuple[str, float] | None
    nearest: list[tuple[int, float]]
    strip: list[int]

    @property
    def color(self) -> str:
        """Its colour on light and on dark ground."""
        return _COLORS[self.id] if self.id < len(_COLORS) else f"hsl({round(self.id * 137.508) % 360} 55% 55%)"


def groups_of(content: Content) -> list[Group]:
    """Return all groups by number, the empty ones too."""
    data = content.assignments
    n_groups = content.n_groups
    nearest = _nearest(content, n_groups)
    total = max(1, data.clusters.size)
    split_names = list(dict.fromkeys(data.splits))
    order = np.argsort(data.clusters, kind="stable")
    bounds = np.searchsorted(data.clusters[order], np.arange(n_groups + 1))
    groups = []
    for group in range(n_groups):
        members = order[bounds[group] : bounds[group + 1]]
        known = data.confidence[members]
        known = known[~np.isnan(known)]
        in_split = Counter(data.splits[i] for i in members)
        shown = prototypes(data.clusters, data.confidence, data.margin, group, typical=STRIP_IMAGES, uncertain=0)
        groups.append(
            Group(
                id=group,
                title=title(group, content.names),
                named=group in content.names,
                size=members.size,
                share=members.size / total,
                confidence=float(known.mean()) if known.size else math.nan,
                by_split=[(name, in_split[name]) for name in split_names] if len(split_names) > 1 else [],
                label=_main_label(data, members),
                nearest=nearest.get(group, []),
                strip=shown.typical,
            )
        )
    return groups


def _main_label(data: Assignments, members: NDArray[np.int64]) -> tuple[str, float] | None:
    if data.labels is None:
        return None
    known = Counter(label for i in members if (label := data.labels[i]))
    if not known:
        return None
    label, frequency = min(known.items(), key=lambda item: (-item[1], item[0]))
    return label, frequency / known.total()


def _nearest(content: Content, n_groups: int) -> dict[int, list[tuple[int, float]]]:
    """Return for each group the three with the most similar mean embedding, and the cosine similarities."""
    if content.embeddings is None:
        return {}
    means = np.zeros((n_groups, content.embeddings.shape[1]))
    for group in range(n_groups):
        members = content.embeddings[content.assignments.clusters == group]
        if len(members):
            means[group] = members.mean(axis=0)
    length = np.linalg.norm(means, axis=1)
    # Empty groups, and those whose members point everywhere or are not finite, are near to none.
    usable = np.flatnonzero((length > 1e-6) & np.isfinite(length))
    unit = means[usable] / length[usable, None]
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    order = np.argsort(-similarity, axis=1, kind="stable")[:, : min(3, usable.size - 1)]
    return {
        int(usable[row]): [(int(usable[column]), float(similarity[row, column])) for column in columns]
        for row, columns in enumerate(order)
    }


def facts(content: Content, groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return name and value of the facts in the heading."""
    data, summary = content.assignments, content.summary
    found = [("images", count(len(data.paths))), ("groups", count(len(groups)))]
    splits = Counter(data.splits)
    if len(splits) > 1:
        found.append(("by split", ", ".join(f"{count(n)} {name}" for name, n in splits.items())))
    if not np.isnan(data.confidence).all():
        found.append(("mean confidence", percent(float(np.nanmean(data.confidence)))))
    backbone = content.config.model.backbone
    if summary.backbone is not None:  # what an open choice of the configuration stands for
        backbone = str(summary.backbone["backbone"])
    found.append(("backbone", backbone))
    if summary.backbone is not None:
        weights = str(summary.backbone["weights"] or "random at first")
        found.append(("weights", Path(weights).name if summary.backbone["digest"] else weights))
        side = summary.backbone["image_size"]
        found.append(("image size", f"{side} × {side}"))
    if summary.stages:
        found.append(("time", duration(summary.seconds)))
    found.append(("seed", str(content.config.seed)))
    return found


def choice(content: Content) -> Mapping[str, Any] | None:
    """Return how the clustering stage says that the groups were found: method, score, reason and candidates."""
    found = content.summary.stages.get("clustering", {}).get("choice")
    return found if isinstance(found, Mapping) else None


def suggested_k(content: Content) -> Mapping[str, Any] | None:
    """Return which number of groups the clustering stage suggests, and the curve that it comes from."""
    found = content.summary.stages.get("number")
    return found if isinstance(found, Mapping) and isinstance(found.get("k"), int) else None


def warnings(content: Content, groups: Sequence[Group], findings: Findings, unreadable: int) -> list[tuple[str, str]]:
    """Return what looks wrong, each with what to try.

    Args:
        content: the artifacts of the run.
        groups: all groups.
        findings: what was found among the images.
        unreadable: images whose file is lost or cannot be read any more.
    """
    return [
        *_about_sizes(groups),
        *_about_confidence(content.assignments, len(groups)),
        *_about_neighbours(groups, findings),
        *_about_k(content),
        *_about_files(content, unreadable),
    ]


def _about_sizes(groups: Sequence[Group]) -> list[tuple[str, str]]:
    found = []
    n = len(groups)
    if empty := [g.id for g in groups if g.size == 0]:
        found.append(
            (
                f"{len(empty)} of {n} groups {'is' if len(empty) == 1 else 'are'} empty: {_ids(empty)}.",
                "Ask for fewer groups, or give the entropy term more weight (clustering.objective.entropy_weight).",
            )
        )
    if tiny := [g.id for g in groups if 0 < g.share < 0.1 / n]:
        found.append(
            (
                f"{len(tiny)} of {n} groups {'has' if len(tiny) == 1 else 'have'} less than a tenth of "
                f"an even share: {_ids(tiny)}.",
                "Rare kinds of images look like this, and so does a clustering stage that has not trained long enough.",
            )
        )
    limit = {2: 0.9, 3: 0.6}.get(n, min(0.5, 4 / n) if n else 1.0)
    found += [
        (
            f"Group #{group.id} holds {percent(group.share)} of the images.",
            "If these images are not alike, train the pretext stage longer, ask for more groups, or give the "
            "entropy term more weight (clustering.objective.entropy_weight).",
        )
        for group in groups
        if n > 1 and group.share > limit
    ]
    return found


def _about_confidence(data: Assignments, n_groups: int) -> list[tuple[str, str]]:
    if n_groups < 2 or np.isnan(data.confidence).all():
        return []
    chance, mean = 1 / n_groups, float(np.nanmean(data.confidence))
    if mean < chance + 0.1 * (1 - chance):
        return [
            (
                f"The mean confidence is {percent(mean)}, hardly more than an even guess ({percent(chance)}).",
                "The groups are not settled: train the clustering stage longer or with a higher learning rate.",
            )
        ]
    sure = float((np.nan_to_num(data.margin) > CONFIDENT_MARGIN).mean())
    if sure < FEW_CONFIDENT:
        return [
            (
                f"Only {percent(sure)} of the images are clearly in one group (margin above {CONFIDENT_MARGIN:g}).",
                "Look at the least confident images of each group; another number of groups may fit better, or the "
                "clustering stage needs more epochs.",
            )
        ]
    return []


def _about_neighbours(groups: Sequence[Group], findings: Findings) -> list[tuple[str, str]]:
    if not findings.linked:
        return []
    pairs = [f"#{pair.first} and #{pair.second}" for pair in findings.linked[:4]]
    more = f", and {len(findings.linked) - 4} more pairs" if len(findings.linked) > 4 else ""
    return [
        (
            f"Groups that may be one: {', '.join(pairs)}{more}.",
            "Their images are each other's nearest neighbours. Give both the same name, or ask for fewer groups.",
        )
    ]


def _about_k(content: Content) -> list[tuple[str, str]]:
    found = suggested_k(content)
    if found is None:
        return []
    tried = sorted({entry["k"] for entry in found.get("curve", ()) if isinstance(entry, Mapping) and "k" in entry})
    if len(tried) < 2 or found["k"] not in (tried[0], tried[-1]):
        return []
    edge, beyond = ("fewest", "fewer") if found["k"] == tried[0] else ("most", "more")
    return [
        (
            f"The suggested number of groups, {found['k']}, is the {edge} that was tried ({tried[0]} to {tried[-1]}).",
            f"Perhaps {beyond} would fit better: try them with --clusters.",
        )
    ]


def _about_files(content: Content, unreadable: int) -> list[tuple[str, str]]:
    found = []
    if n := len(content.skipped):
        path, reason = content.skipped[0]
        found.append(
            (
                f"{count(n)} file{'s' if n > 1 else ''} could not be read and {'are' if n > 1 else 'is'} in no group.",
                f"The first is {path}: {reason}. All are in skipped.csv.",
            )
        )
    if unreadable:
        found.append(
            (
                f"{count(unreadable)} image{'s' if unreadable > 1 else ''} of the groups cannot be read any more.",
                "They were moved, removed or damaged after the run; the page shows their names.",
            )
        )
    return found


def _ids(groups: Sequence[int]) -> str:
    more = f" and {len(groups) - 12} more" if len(groups) > 12 else ""
    return ", ".join(f"#{group}" for group in groups[:12]) + more


def candidates(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row of text for each candidate of a choice: name, groups, score, seconds."""
    rows = []
    for entry in found.get("candidates", ()):
        if isinstance(entry, Mapping):
            cells = [entry.get(key) for key in ("k", "score", "seconds")]
            rows.append([str(entry.get("name", "")), *("–" if c is None else number(float(c)) for c in cells)])
    return rows
