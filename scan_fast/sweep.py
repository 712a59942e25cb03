"""One configuration with several seeds: mean and standard deviation of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs import artifacts
from .runs.config import Config
from .runs.folder import RunFolder
from .runs.records import Summary
from .runs.tracker import Tracker
from .stages.pipeline import run_stages, stages_of
from .training.context import open_context


def sweep(config: Config, seeds: Sequence[int], parent: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run ``config`` once per seed in ``parent/seed<N>`` and write ``parent/sweep.json``.

    Finished runs are not repeated; unfinished ones continue.

    Returns:
        {"seeds": [...], "<stage> <metric>": {"mean", "std" (of a sample, 0 for one seed), "values"}, ...,
        "seconds": {...}}. Metrics of a test split are named "<stage> test <metric>".
    """
    summaries = []
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        run = RunFolder.open(parent / f"seed{seed}", seeded)
        with run:
            context = open_context(seeded, run, Tracker(run, quiet=quiet, prefix=f"seed {seed}: "))
            run_stages(context, stages_of(context))
            summaries.append(run.summary())
    results: dict[str, Any] = {"seeds": list(seeds)}
    for name, values in _collect(summaries).items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        results[name] = {"mean": statistics.mean(values), "std": deviation, "values": values}
    artifacts.write(artifacts.SWEEP, results, parent / artifacts.SWEEP.name)
    return results


def _collect(summaries: list[Summary]) -> dict[str, list[float]]:
    collected: dict[str, list[float]] = {}
    split = summaries[0].reported
    of_split = "test " if split == "test" else ""
    for stage, entry in summaries[0].stages.items():
        entries = [summary.stages[stage] for summary in summaries]
        for key in ("knn_acc", "purity"):
            if key in entry:
                collected[f"{stage} {key}"] = [each[key] for each in entries]
        for key in ("acc_many_to_one", "acc", "nmi", "ari"):
            if key in entry.get(split, {}):
                collected[f"{stage} {of_split}{key}"] = [each[split][key] for each in entries]
    for name, baseline in (summaries[0].baselines or {}).items():
        for key in ("acc_many_to_one", "acc"):
            if f"{key}_mean" in baseline:
                collected[f"{name} {of_split}{key}"] = [
                    summary.baselines[name][f"{key}_mean"] for summary in summaries if summary.baselines is not None
                ]
    return collected | {"seconds": [summary.seconds for summary in summaries]}
