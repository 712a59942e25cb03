"""Ranks of trials and their order at two sizes, on made-up figures."""

import math
import time
from typing import Any

import pytest
from scipy import stats

from benchmarks.trials import figures, running, tables
from scan_fast.errors import UsageError


def result(trials: dict[str, list[tuple[float, float]]], start: float | None = 0.5) -> dict[str, Any]:
    """Return a result with (purity, CPU seconds) of each seed; all trials start at the same purity."""
    seeds = max(map(len, trials.values()))
    untrained = {str(seed): {"mining": {"purity": start}} for seed in range(seeds)}
    return {
        "benchmark": "trials",
        "set": [],
        "untrained": {} if start is None else {"k": untrained},
        "trials": {
            name: {
                "changes": [],
                "predicted": f"{name} | wins",
                **({} if start is None else {"untrained": "k"}),
                "seeds": {
                    str(seed): {"pretext": {"cpu_seconds": seconds - 1}, "mining": {"purity": value, "cpu_seconds": 1}}
                    for seed, (value, seconds) in enumerate(runs)
                },
            }
            for name, runs in trials.items()
        },
    }


def test_trials_are_ranked_by_their_gain_per_minute() -> None:
    ranked = figures.rank(
        result(
            {
                "long": [(0.90, 120), (0.92, 120)],
                "short": [(0.80, 30), (0.82, 30)],
                "wasteful": [(0.70, 240), (0.72, 240)],
                "nothing": [(0.50, 1), (0.50, 1)],
            }
        ),
        "purity",
    )
    assert ranked["long"].gains == pytest.approx([0.40, 0.42]) and ranked["long"].rates == pytest.approx([0.20, 0.21])
    assert [entry.rank for entry in ranked.values()] == [2, 1, 3, 4]
    # By accuracy per second alone, doing nothing would be first.
    assert max(ranked, key=lambda name: ranked[name].metric[0] / ranked[name].seconds[0]) == "nothing"
    assert [entry.unbeaten for entry in ranked.values()] == ["yes", "yes", "no", "yes"]
    assert not any(entry.close for entry in ranked.values())


def test_a_difference_within_the_spread_is_not_called_real() -> None:
    ranked = figures.rank(result({"a": [(0.80, 60), (0.90, 60)], "b": [(0.79, 61), (0.88, 62)]}), "purity")
    assert ranked["b"].unbeaten == "unclear" and ranked["a"].unbeaten == "yes"
    assert (ranked["a"].rank, ranked["b"].rank, ranked["b"].close) == (1, 2, True)


def test_a_network_that_is_not_trained_has_no_rank() -> None:
    ranked = figures.rank(result({"as it is": [(0.6, 5)]}, start=None), "purity")
    assert ranked["as it is"].rank is None and ranked["as it is"].unbeaten == "yes"


def test_the_least_real_difference_is_that_of_student() -> None:
    groups = [[0.1, 0.3], [0.5, 0.5], [0.9]]
    spread = figures.Spread.of(groups)
    assert spread.freedom == 2 and spread.deviation == pytest.approx(math.sqrt(0.02 / 2))
    assert spread.least(2, 1) == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 * math.sqrt(1.5))
    unknown = figures.Spread.of([[0.1], [0.9]])
    assert unknown.least(1, 1) == math.inf and not unknown.real([0.1], [0.9])
    same = figures.Spread.of([[0.2, 0.2], [0.3, 0.3]])
    assert same.real([0.2, 0.2], [0.3, 0.3]) and not same.real([0.2, 0.2], [0.2, 0.2])


def test_the_table_of_a_plan_has_predictions_figures_and_outcomes_in_this_order() -> None:
    made = result({"a": [(0.80, 60), (0.82, 60)], "b": [(0.60, 90), (0.61, 90)], "c": []})
    made["trials"]["b"]["outcome"] = "it lost"
    text = tables.plan(made)
    assert text.index("a \\| wins") < text.index("81.0 ± 1.4") < text.index("it lost")
    assert "| a | 2 | 81.0 ± 1.4 | 60.0 ± 0.0 | 31.0 ± 1.4 | 31.0 ± 1.4 | 1 | yes |" in text
    assert "| b | 2 | 60.5 ± 0.7 | 90.0 ± 0.0 | 10.5 ± 0.7 | 7.0 ± 0.5 | 2 | no |" in text
    assert "| c | 0 |  |  |  |  |  |  |" in text
    assert "Nothing has been measured yet." in tables.plan(result({"a": []}))


def test_the_order_at_two_sizes() -> None:
    small = result({"a": [(0.70, 9), (0.71, 9)], "b": [(0.60, 9), (0.61, 9)], "c": [(0.65, 9), (0.66, 9)], "d": []})
    large = result({"a": [(0.90, 9), (0.91, 9)], "b": [(0.85, 9), (0.86, 9)], "c": [(0.80, 9), (0.81, 9)]})
    found = figures.compare(small, large)
    assert found.metric == "purity" and list(found.trials) == ["a", "b", "c"] and found.left_out == ["d"]
    assert found.spearman == pytest.approx(0.5) and found.kendall == pytest.approx(1 / 3)
    (swapped,) = [pair for pair in found.pairs if pair.swapped]
    assert (swapped.first, swapped.second) == ("b", "c") and swapped.small_real and swapped.large_real
    text = tables.comparison(found, "small", "large")
    assert "The same order have 2 of 3 pairs." in text and "b and c (+5.0, then -5.0; real at both sizes)" in text
    assert "In one of the two only: d." in text


def test_a_swap_within_the_spread_is_named_as_such() -> None:
    small = result({"a": [(0.70, 9), (0.80, 9)], "b": [(0.74, 9), (0.79, 9)]})
    large = result({"a": [(0.90, 9), (0.91, 9)], "b": [(0.80, 9), (0.81, 9)]})
    found = figures.compare(small, large, "purity")
    assert [(pair.swapped, pair.small_real, pair.large_real) for pair in found.pairs] == [(True, False, True)]
    assert "real at the large size only" in tables.comparison(found, "small", "large")
    equal = figures.compare(small, result({"a": [(0.9, 9)], "b": [(0.9, 9)]}))
    assert equal.spearman is None and "Spearman not defined" in tables.comparison(equal, "small", "large")


def test_results_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(UsageError, match="share 1 trial names"):
        figures.compare(result({"a": [(0.7, 9)], "b": [(0.7, 9)]}), result({"a": [(0.7, 9)]}))
    both = result({"a": [(0.7, 9)], "b": [(0.7, 9)]})
    with pytest.raises(UsageError, match="do not have acc of two trials"):
        figures.compare(both, both, "acc")


def test_trials_on_a_gpu_cost_elapsed_seconds() -> None:
    gpu = result({"a": [(0.80, 61)]}) | {"device": "cuda"}
    for trial in gpu["trials"].values():
        for run in trial["seeds"].values():
            for stage in run.values():
                stage["seconds"] = stage.pop("cpu_seconds")
    assert figures.rank(gpu, "purity")["a"].seconds == [61]
    text = tables.ranking(gpu)
    assert "| s | gain |" in text and "per minute" in text and "CPU" not in text
    assert "pretext, s" in tables.table(gpu)
    assert running.clock_of("cpu").now is time.process_time and running.clock_of("cuda").now is time.perf_counter
