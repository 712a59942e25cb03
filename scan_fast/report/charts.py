"""Line charts as inline SVG; the page's style sheet gives their colors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from ..runs.records import MetricsEntry
from .text import number

_WIDTH, _HEIGHT = 320, 150
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 22
_POINTS = 300


@dataclass(frozen=True)
class Series:
    """Values of one metric of a stage at increasing epochs."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


def series_of(entries: Iterable[MetricsEntry]) -> dict[str, list[Series]]:
    """Group metrics by stage and name; a later entry of the same epoch replaces the earlier one."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for entry in entries:
        stage = found.setdefault(entry.stage, {})
        for name, value in entry.values.items():
            stage.setdefault(name, {})[entry.epoch] = value
    return {
        stage: [Series(name, sorted(points), [points[x] for x in sorted(points)]) for name, points in metrics.items()]
        for stage, metrics in found.items()
    }


def line_chart(series: Series, unit: tuple[str, str] = ("epoch", "epochs")) -> Markup | None:
    """Draw one series, or return None if it has less than two points or no finite value.

    Values that are not finite leave a gap. Long series are thinned to about 300 points, keeping each bin's extremes, so
    that a spike stays visible and the page small. ``unit`` names what the x axis counts, at its start and in the
    description.
    """
    finite = [(x, y) for x, y in zip(series.x, series.y, strict=True) if math.isfinite(y)]
    if len(series.x) < 2 or not finite:
        return None
    low, high = min(y for _, y in finite), max(y for _, y in finite)
    first, last = series.x[0], series.x[-1]
    label_low, label_high = number(low, 3), number(high, 3)
    if high == low:
        low, high = low - 0.5, high + 0.5
        label_low, label_high = "", label_high
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first)
        return _LEFT + across * width, _TOP + (1 - (y / 2 - low / 2) / (high / 2 - low / 2)) * height

    path, pen_down = [], False
    for x, y in _thinned(series):
        pen_down = pen_down and math.isfinite(y)
        if math.isfinite(y):
            px, py = place(x, y)
            path.append(f"{'L' if pen_down else 'M'}{px:.1f} {py:.1f}")
            pen_down = True
    end_x, end_y = place(*finite[-1])
    base = _TOP + height
    grid = "".join(
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        for y in (_TOP, _TOP + height / 2, base)
    )
    middle = base if label_low else _TOP + height / 2
    y_labels = (
        f'<text x="{_LEFT - 6}" y="{_TOP + 4}" text-anchor="end">{label_high}</text>'
        f'<text x="{_LEFT - 6}" y="{base + 4}" text-anchor="end">{label_low}</text>'
        if label_low
        else f'<text x="{_LEFT - 6}" y="{middle + 4}" text-anchor="end">{label_high}</text>'
    )
    x_labels = (
        f'<text x="{_LEFT}" y="{_HEIGHT - 5}">{unit[0]} {number(first)}</text>'
        f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 5}" text-anchor="end">{number(last)}</text>'
    )
    description = (
        f"{series.name} over {len(series.x)} {unit[1]}: first {number(finite[0][1])}, "
        f"last {number(finite[-1][1])}, lowest {number(min(y for _, y in finite))}, "
        f"highest {number(max(y for _, y in finite))}"
    )
    # Only the series' name is foreign text; Markup.format escapes it.
    drawing = f'{grid}{y_labels}{x_labels}<path class="line" d="{" ".join(path)}"/>'
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}</svg>').format(
        _WIDTH,
        _HEIGHT,
        description,
        Markup(drawing),
        Markup(f'<circle class="dot" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.5"/>'),
    )


def _thinned(series: Series) -> list[tuple[float, float]]:
    points = list(zip(series.x, series.y, strict=True))
    if len(points) <= _POINTS:
        return points
    size = math.ceil(len(points) / (_POINTS // 2))
    kept: list[tuple[float, float]] = []
    for start in range(0, len(points), size):
        chunk = points[start : start + size]
        finite = [p for p in chunk if math.isfinite(p[1])]
        if not finite:
            kept.append(chunk[0])
            continue
        extremes = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
        kept.extend(sorted(extremes))
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]
