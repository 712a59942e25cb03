"""One configuration with several seeds: mean, standard deviation and best of the results."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import RunError
from .runs import artifacts
from .runs.config import Config, differences
from .runs.folder import RunFolder
from .runs.records import Summary
from .sharing import OF_PRETEXT, SHARED, Planned, run_all
from .stages.beforehand import check_beforehand

METRICS = ("acc", "acc_many_to_one", "nmi", "ari", "ami", "acc_top5")
"""The metrics of a split that are collected; :func:`.evaluation.metrics.clustering_metrics` explains them."""


def sweep(
    config: Config,
    seeds: Sequence[int],
    parent: Path,
    *,
    quiet: bool = False,
    share_pretext: bool = False,
    shared: Path | None = None,
) -> dict[str, Any]:
    """Run ``config`` once per seed in ``parent/seed<N>`` and write ``parent/sweep.json``.

    Finished runs are not repeated; unfinished ones continue.

    Args:
        config: the configuration; its own seed is that of a shared pretext stage.
        seeds: the seeds.
        parent: holds the run folders.
        quiet: print errors only.
        share_pretext: do the pretext stage and mining once, for the configuration's own seed, in ``parent/shared``. The
            result is the same whichever seeds are asked for. The authors of SCAN repeated their runs in this way.
        shared: the folder of the pretext stages and mining, in place of ``parent/shared``. Sweeps and ablations that
            name the same folder do them once.

    Returns:
        {"seeds": [...], "<stage> <metric>": {"mean", "std" (of a sample, 0 for one seed), "best", "best_seed",
        "values"}, ..., "seconds": {"mean", "std", "values", "total"}}. Metrics of a test split are named
        "<stage> test <metric>". Stages that were shared are in none of the "values" of "seconds"; "shared" has them by
        folder, and "total" counts them once.

    Raises:
        RunError: if ``parent`` holds runs of another configuration, or runs that (do not) share a pretext stage.
        DataError: before anything is trained, if a file of ``mining.files`` cannot be used.
    """
    pinned = config.seed if share_pretext else None
    plans = [Planned(parent / f"seed{seed}", config.with_seed(seed), f"seed {seed}: ", pinned) for seed in seeds]
    for folder in sorted(parent.glob("seed*")):
        _check_other(RunFolder(folder), config, parent)
    if config.mining.files is not None and not all(RunFolder(plan.folder).finished("mining") for plan in plans):
        check_beforehand(config)
    always = shared is not None
    share = OF_PRETEXT if always else ()
    outcome = run_all(plans, shared or parent / SHARED, share=share, always=always, quiet=quiet)
    results: dict[str, Any] = {"seeds": list(seeds)}
    for name, values in collect(outcome.summaries).items():
        results[name] = statistics_of(values, seeds)
    seconds = [summary.seconds for summary in outcome.summaries]
    results["seconds"] = statistics_of(seconds) | {"total": outcome.seconds}
    if outcome.shared_seconds:
        results["seconds"]["shared"] = outcome.shared_seconds
    artifacts.write(artifacts.SWEEP, results, parent / artifacts.SWEEP.name)
    return results


def statistics_of(values: Sequence[float], seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Return mean, std (of a sample, 0 for one value) and values; with seeds also the largest value and its seed."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    found: dict[str, Any] = {"mean": statistics.mean(values), "std": deviation}
    if seeds is not None:
        best = max(range(len(values)), key=values.__getitem__)
        found |= {"best": values[best], "best_seed": seeds[best]}
    return found | {"values": list(values)}


def collect(summaries: Sequence[Summary]) -> dict[str, list[float]]:
    """Return the metrics that all runs have, by "<stage> <metric>", in the order of the runs."""
    collected: dict[str, list[float]] = {}
    split = summaries[0].reported
    of_split = "test " if split == "test" else ""

    def gather(name: str, entries: Sequence[dict[str, Any]], key: str) -> None:
        values = [entry.get(key) for entry in entries]
        if all(isinstance(value, int | float) for value in values):
            collected[name] = values  # type: ignore[assignment]

    for stage in summaries[0].stages:
        entries = [summary.stages.get(stage, {}) for summary in summaries]
        for key in ("knn_acc", "purity"):
            gather(f"{stage} {key}", entries, key)
        for key in METRICS:
            gather(f"{stage} {of_split}{key}", [entry.get(split, {}) for entry in entries], key)
    for name in summaries[0].baselines or {}:
        found: list[Any] = [(summary.baselines or {}).get(name, {}) for summary in summaries]
        for key in ("acc", "acc_many_to_one"):
            gather(f"{name} {of_split}{key}", found, f"{key}_mean")
    return collected


def _check_other(run: RunFolder, config: Config, parent: Path) -> None:
    """Refuse a folder of a run with another configuration, whether or not its seed is asked for."""
    if not run.has(artifacts.CONFIG) or not run.has_results():
        return
    found = run.read(artifacts.CONFIG)
    changed = differences(found, config.with_seed(found.seed))
    if changed:
        raise RunError(
            f"{parent} holds a sweep of another configuration ({'; '.join(changed)}); undo the change, or choose "
            "another folder with --out"
        )
