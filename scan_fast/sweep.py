"""The same run with several seeds: mean and standard deviation of what it reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .runs.config import Config
from .runs.folder import RunFolder
from .runs.tracker import Tracker
from .stages.pipeline import run_stages, stages_of
from .training.context import open_context


def sweep(config: Config, seeds: Sequence[int], parent: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run ``config`` once per seed in ``parent/seed<N>`` and write ``parent/sweep.json``.

    Runs that are finished are taken as they are, unfinished ones go on.

    Returns:
        {"seeds": [...], "<stage> <metric>": {"mean", "std" (of a sample, 0 for one seed), "values"}, ...,
        "seconds": {...}}.
    """
    summaries = []
    for seed in seeds:
        seeded = config.model_copy(update={"seed": seed})
        run = RunFolder.open(parent / f"seed{seed}", seeded)
        with run:
            context = open_context(seeded, run, Tracker(run, quiet=quiet))
            run_stages(context, stages_of(context))
            summaries.append(run.summary())
    results: dict[str, Any] = {"seeds": list(seeds)}
    for name, values in _collect(summaries).items():
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        results[name] = {"mean": statistics.mean(values), "std": deviation, "values": values}
    RunFolder(parent).write_json("sweep.json", results)
    return results


def _collect(summaries: list[dict[str, Any]]) -> dict[str, list[float]]:
    collected: dict[str, list[float]] = {}
    for stage, entry in summaries[0]["stages"].items():
        entries = [summary["stages"][stage] for summary in summaries]
        for key in ("knn_acc", "purity"):
            if key in entry:
                collected[f"{stage} {key}"] = [each[key] for each in entries]
        for key in ("acc", "nmi", "ari"):
            if key in entry.get("test", {}):
                collected[f"{stage} test {key}"] = [each["test"][key] for each in entries]
    for name, entry in summaries[0].get("baselines", {}).items():
        collected[f"{name} test acc"] = [summary["baselines"][name]["acc_mean"] for summary in summaries if entry]
    return collected | {"seconds": [summary["seconds"] for summary in summaries]}
