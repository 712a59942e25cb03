"""Tables of trials, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import figures
from .figures import METRICS, Comparison, Pair

COLUMNS = {"knn_acc": "kNN", "purity": "purity", "test_purity": "test purity"}
VERDICTS = {"yes": "yes", "unclear": "within the spread", "no": "no"}


def table(result: Mapping[str, Any]) -> str:
    """Return the mean of every figure per trial and, for several seeds, its deviation."""
    trials = result["trials"]
    columns = list(
        dict.fromkeys(
            (stage, key)
            for trial in trials.values()
            for run in trial["seeds"].values()
            for stage, found in run.items()
            for key in found
        )
    )
    names = [COLUMNS.get(key, key) if stage in ("pretext", "mining") else f"{stage} {key}" for stage, key in columns]
    names = [
        f"{stage}, s" if key in figures.SECONDS else name for (stage, key), name in zip(columns, names, strict=True)
    ]
    rows = []
    for name, trial in trials.items():
        cells = []
        for stage, key in columns:
            values = [run[stage][key] for run in trial["seeds"].values() if key in run.get(stage, {})]
            cells.append("" if not values else _seconds(values) if key in figures.SECONDS else _percent(values))
        rows.append([name, _code(trial["changes"]), str(len(trial["seeds"])), *cells])
    return _lines(["trial", "changes", "seeds", *names], rows, left=2)


def predictions(result: Mapping[str, Any]) -> str:
    """Return the changes and the prediction of each trial of a plan."""
    rows = [[name, _code(trial["changes"]), trial.get("predicted", "")] for name, trial in result["trials"].items()]
    return _lines(["trial", "changes", "predicted"], rows, left=3)


def ranking(result: Mapping[str, Any]) -> str:
    """Return the figures of each trial, its gain over the untrained network and its rank."""
    metric = figures.ranked_metric(result)
    if metric is None:
        return "Nothing has been measured yet.\n"
    ranked = figures.rank(result, metric)
    shown = [key for key in METRICS if any(figures.values(trial, key) for trial in result["trials"].values())]
    on_cpu = result.get("device", "cpu") == "cpu"
    time = "CPU s" if on_cpu else "s"
    heading = ["trial", "seeds", *(METRICS[key] for key in shown), time, "gain", "gain per minute", "rank"]
    rows = []
    for name, trial in result["trials"].items():
        cells = [_percent(figures.values(trial, key)) for key in shown]
        row = [name, str(len(trial["seeds"])), *cells]
        if name in ranked:
            entry = ranked[name]
            place = "" if entry.rank is None else f"{entry.rank}{' ~' if entry.close else ''}"
            spread = f" ± {statistics.stdev(entry.seconds):.1f}" if len(entry.seconds) > 1 else ""
            row += [f"{statistics.mean(entry.seconds):.1f}{spread}", _percent(entry.gains), _percent(entry.rates)]
            row += [place, VERDICTS[entry.unbeaten]]
        else:
            row += [""] * 5
        rows.append(row)
    of_rank = (
        f"Ranked by {METRICS[metric]}: points above the same network untrained, per {'CPU ' if on_cpu else ''}minute."
    )
    least = figures.Spread.of([entry.metric for entry in ranked.values()])
    pairs = [len(entry.metric) for entry in ranked.values()]
    if least.freedom:
        low = min(pairs)
        of_rank += (
            f" A difference of {100 * least.least(low, low):.1f} points of {METRICS[metric]} or more is real "
            f"(5 %, {low} seed{'s' if low > 1 else ''} each)."
        )
    else:
        of_rank += " The spread is not known, because each trial has one seed."
    if any(entry.close for entry in ranked.values()):
        of_rank += " ~: no real difference from the rank before."
    return f"{_lines([*heading, 'unbeaten'], rows)}\n{of_rank} Unbeaten: no other trial is better and cheaper.\n"


def outcomes(result: Mapping[str, Any]) -> str:
    """Return what was found, an empty text if nothing has been written."""
    rows = [[name, trial["outcome"]] for name, trial in result["trials"].items() if trial.get("outcome")]
    return _lines(["trial", "outcome"], rows, left=2) if rows else ""


def plan(result: Mapping[str, Any]) -> str:
    """Return predictions, figures with ranks, and outcomes."""
    parts = (predictions(result), ranking(result), outcomes(result))
    return "\n".join(filter(None, parts))


def comparison(found: Comparison, small: str, large: str) -> str:
    """Return the order of the trials at two sizes, in a table and in words.

    Args:
        found: the comparison.
        small: the title of the column of the smaller size.
        large: that of the larger one.
    """
    means = {side: {name: statistics.mean(both[side]) for name, both in found.trials.items()} for side in (0, 1)}
    rows = []
    for name, both in found.trials.items():
        places = [sum(other > means[side][name] for other in means[side].values()) + 1 for side in (0, 1)]
        cells = [_percent(both[0]), str(places[0]), _percent(both[1]), str(places[1])]
        rows.append([name, *cells])
    title = METRICS[found.metric]
    heading = ["trial", f"{title}, {small}", "place", f"{title}, {large}", "place"]
    correlations = ", ".join(
        f"{name} {'not defined' if value is None else f'{value:.2f}'}"
        for name, value in (("Spearman", found.spearman), ("Kendall", found.kendall))
    )
    kept = sum(pair.small * pair.large > 0 for pair in found.pairs)
    text = [f"Rank correlation: {correlations}. The same order have {kept} of {len(found.pairs)} pairs."]
    swapped = [pair for pair in found.pairs if pair.swapped]
    if swapped:
        text.append(f"Swapped: {'; '.join(map(_swap, swapped))}.")
    if found.left_out:
        text.append(f"In one of the two only: {', '.join(found.left_out)}.")
    return f"{_lines(heading, rows)}\n{' '.join(text)}\n"


def _swap(pair: Pair) -> str:
    sizes = {(True, True): "real at both sizes", (False, False): "at no size more than the spread"}
    one = "real at the small size only" if pair.small_real else "real at the large size only"
    verdict = sizes.get((pair.small_real, pair.large_real), one)
    return f"{pair.first} and {pair.second} ({100 * pair.small:+.1f}, then {100 * pair.large:+.1f}; {verdict})"


def _percent(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _seconds(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.0f}"


def _code(words: Sequence[str]) -> str:
    return f"`{' '.join(words)}`" if words else ""


def _lines(heading: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """Return a table whose first ``left`` columns are text, the others numbers."""
    lines = [f"| {' | '.join(heading)} |", f"|{'---|' * left}{'---:|' * (len(heading) - left)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"
