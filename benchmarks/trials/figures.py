"""Statistics of trials: means and spreads over seeds, ranks, and the order at two sizes (see the package)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

from scipy import stats

from scan_fast.errors import UsageError

METRICS = {"knn_acc": "kNN", "purity": "purity", "test_purity": "test purity", "acc": "acc", "nmi": "nmi"}
"""The metrics of trials with their titles."""
LAST = ("acc", "purity", "knn_acc")
"""The metrics by which trials are ranked, the first that is known."""
SIGNIFICANCE = 0.05

Run = Mapping[str, Mapping[str, float]]
"""Of one seed: by stage, metrics and seconds."""
SECONDS = ("cpu_seconds", "seconds")
"""Costs: CPU time of trials on a CPU, elapsed time of those on a GPU."""


def value_of(run: Run, metric: str) -> float | None:
    """Return a metric of the last stage that has it."""
    return next((figures[metric] for figures in reversed(list(run.values())) if metric in figures), None)


def cost_of(run: Run) -> float:
    """Return the seconds of all stages."""
    return sum(figures.get(key, 0.0) for figures in run.values() for key in SECONDS)


def values(trial: Mapping[str, Any], metric: str) -> list[float]:
    """Return a metric of each seed of a trial that has it."""
    found = (value_of(run, metric) for run in trial["seeds"].values())
    return [value for value in found if value is not None]


def ranked_metric(result: Mapping[str, Any]) -> str | None:
    """Return the metric by which a result ranks its trials, None if nothing has been measured."""
    return next((key for key in LAST if any(values(trial, key) for trial in result["trials"].values())), None)


@dataclass(frozen=True)
class Spread:
    """The spread of a figure over seeds, pooled over trials.

    Attributes:
        deviation: the standard deviation; NaN if no trial has two seeds.
        freedom: its degrees of freedom.
    """

    deviation: float
    freedom: int

    @classmethod
    def of(cls, groups: Sequence[Sequence[float]]) -> Spread:
        """Return the pooled spread of the figures of several trials."""
        several = [group for group in groups if len(group) > 1]
        freedom = sum(len(group) - 1 for group in several)
        if not freedom:
            return cls(math.nan, 0)
        squares = sum((len(group) - 1) * statistics.variance(group) for group in several)
        return cls(math.sqrt(squares / freedom), freedom)

    def least(self, n: int, m: int) -> float:
        """Return the least difference of means over n and m seeds that is real; infinite if the spread is unknown."""
        if not self.freedom:
            return math.inf
        quantile = float(stats.t.ppf(1 - SIGNIFICANCE / 2, self.freedom))
        return quantile * self.deviation * math.sqrt(1 / n + 1 / m)

    def real(self, first: Sequence[float], second: Sequence[float]) -> bool:
        """Return whether the difference of the means of two trials exceeds the spread."""
        difference = abs(statistics.mean(first) - statistics.mean(second))
        # So that rounding makes no difference of equal figures.
        return difference > self.least(len(first), len(second)) + 1e-12


@dataclass(frozen=True)
class Ranked:
    """A trial among the others.

    Attributes:
        metric: of each seed.
        seconds: of each seed.
        gains: over the untrained network, of each seed; empty if the network is not trained.
        rates: gain per minute, of each seed.
        rank: by the mean rate, from 1; None without rates.
        close: the difference from the rank before is not real.
        unbeaten: "yes": no other trial has both a better mean metric and a lower mean cost. "no": one is better in both
            by a real difference. "unclear": one is better in both, within the spread.
    """

    metric: list[float]
    seconds: list[float]
    gains: list[float]
    rates: list[float]
    rank: int | None = None
    close: bool = False
    unbeaten: Literal["yes", "no", "unclear"] = "yes"


def rank(result: Mapping[str, Any], metric: str) -> dict[str, Ranked]:
    """Rank the trials that have figures.

    Args:
        result: the content of a result file.
        metric: one of :data:`METRICS`.
    """
    found: dict[str, Ranked] = {}
    for name, trial in result["trials"].items():
        starts = result.get("untrained", {}).get(trial.get("untrained"), {})
        entry = Ranked([], [], [], [])
        for seed, run in trial["seeds"].items():
            value, start = value_of(run, metric), value_of(starts.get(seed, {}), metric)
            if value is None:
                continue
            entry.metric.append(value)
            entry.seconds.append(cost_of(run))
            if start is not None:
                entry.gains.append(value - start)
                entry.rates.append(60 * (value - start) / max(cost_of(run), 1e-9))
        if entry.metric:
            found[name] = entry
    metrics = Spread.of([entry.metric for entry in found.values()])
    costs = {name: [math.log(max(seconds, 1e-9)) for seconds in entry.seconds] for name, entry in found.items()}
    logarithms = Spread.of(list(costs.values()))
    rates = Spread.of([entry.rates for entry in found.values()])
    order = sorted((n for n, entry in found.items() if entry.rates), key=lambda n: -statistics.mean(found[n].rates))
    ranked: dict[str, Ranked] = {}
    for name, entry in found.items():
        better = [
            other
            for other, its in found.items()
            if statistics.mean(its.metric) > statistics.mean(entry.metric)
            and statistics.mean(its.seconds) < statistics.mean(entry.seconds)
        ]
        really = [
            other
            for other in better
            if metrics.real(found[other].metric, entry.metric) and logarithms.real(costs[other], costs[name])
        ]
        place = order.index(name) if name in order else None
        close = bool(place) and not rates.real(found[order[(place or 0) - 1]].rates, entry.rates)
        ranked[name] = Ranked(
            entry.metric,
            entry.seconds,
            entry.gains,
            entry.rates,
            rank=None if place is None else place + 1,
            close=close,
            unbeaten="no" if really else "unclear" if better else "yes",
        )
    return ranked


@dataclass(frozen=True)
class Pair:
    """Two trials at two sizes.

    Attributes:
        first, second: their names.
        small, large: the difference of the means, second minus first, at each size.
        small_real, large_real: whether it exceeds the spread of that size.
    """

    first: str
    second: str
    small: float
    large: float
    small_real: bool
    large_real: bool

    @property
    def swapped(self) -> bool:
        """True if the two sizes order them differently."""
        return self.small * self.large < 0


@dataclass(frozen=True)
class Comparison:
    """The order of trials at two sizes.

    Attributes:
        metric: one of :data:`METRICS`.
        trials: by name, the metric of each seed at the small and at the large size.
        left_out: trials that only one of the results has.
        spearman: rank correlation of the means, None if all means of a size are equal.
        kendall: likewise, Kendall's tau b.
        pairs: all pairs of trials.
    """

    metric: str
    trials: dict[str, tuple[list[float], list[float]]]
    left_out: list[str]
    spearman: float | None
    kendall: float | None
    pairs: list[Pair]


def compare(small: Mapping[str, Any], large: Mapping[str, Any], metric: str | None = None) -> Comparison:
    """Compare the order of the trials of two results that have the same name.

    Args:
        small: the content of a result file.
        large: that of another.
        metric: one of :data:`METRICS`; None: the last one that both have.

    Raises:
        UsageError: if they share fewer than two trials, or no metric.
    """
    both = [name for name in small["trials"] if name in large["trials"]]
    if len(both) < 2:
        raise UsageError(f"the results share {len(both)} trial names; two or more are needed to compare their order")
    wanted = LAST if metric is None else (metric,)
    for key in wanted:
        found = {name: (values(small["trials"][name], key), values(large["trials"][name], key)) for name in both}
        trials = {name: figures for name, figures in found.items() if all(figures)}
        if len(trials) >= 2:
            break
    else:
        raise UsageError(f"the results do not have {' or '.join(wanted)} of two trials of the same name")
    left_out = [name for name in {**small["trials"], **large["trials"]} if name not in trials]
    means = [[statistics.mean(figures[side]) for figures in trials.values()] for side in (0, 1)]
    defined = all(len(set(side)) > 1 for side in means)
    spreads = [Spread.of([figures[side] for figures in trials.values()]) for side in (0, 1)]
    pairs = []
    for first, second in combinations(trials, 2):
        sides = list(zip(trials[first], trials[second], strict=True))
        differences = [statistics.mean(after) - statistics.mean(before) for before, after in sides]
        real = [spread.real(*side) for spread, side in zip(spreads, sides, strict=True)]
        pairs.append(Pair(first, second, differences[0], differences[1], real[0], real[1]))
    return Comparison(
        metric=key,
        trials=trials,
        left_out=left_out,
        spearman=float(stats.spearmanr(*means).statistic) if defined else None,
        kendall=float(stats.kendalltau(*means).statistic) if defined else None,
        pairs=pairs,
    )
