"""Accuracy of a configuration over seeds: ``python -m benchmarks.accuracy --config digits --seeds 0 1 2 --json FILE``.

With ``--out`` the run folders are kept, and an interrupted run is resumed. The result has the seconds of each stage,
the measured epochs of each run, and FOLDER in place of the path of the images. On several ranks:
``torchrun --standalone --nproc-per-node 2 -m benchmarks.accuracy --config digits``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scan_fast import distributed
from scan_fast.devices import choose_device
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import MetricsEntry, Summary
from scan_fast.sweep import statistics_of, sweep

from .environment import describe
from .files import FOLDER, write_json

CURVES = ("knn_acc", "acc", "nmi", "selection_score", "clusters_used")
"""The figures of an epoch that a result keeps."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--share-pretext", action="store_true", help="one representation for all seeds")
    parser.add_argument("--out", type=Path, help="keep the run folders here")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    config = load_config(find_config(options.config), options.overrides, {"runtime.device": options.device})
    ranks = distributed.join().world
    with tempfile.TemporaryDirectory() as temporary:
        parent = options.out or Path(distributed.agreed(temporary))
        results = sweep(config, options.seeds, parent, share_pretext=options.share_pretext)
        runs = {seed: RunFolder(parent / f"seed{seed}") for seed in options.seeds}
        results |= stage_seconds([run.summary() for run in runs.values()])
        epochs = {str(seed): measured_epochs(run.metrics()) for seed, run in runs.items()}
        distributed.leave()
    if not distributed.is_first_by_environment():
        return
    for name, entry in results.items():
        if name != "seeds":
            print(f"{name:<28} {entry['mean']:9.4f} ± {entry['std']:.4f}")
    if options.json:
        device = choose_device(options.device).type
        title = f"Accuracy of {config.name}, {config.preset}" if config.preset else f"Accuracy of {config.name}"
        title += f", {ranks} processes" if ranks > 1 else ""
        content: dict[str, Any] = {"benchmark": "accuracy", "title": title, "device": device}
        content |= {"ranks": ranks} if ranks > 1 else {}
        content |= {"environment": describe(device), "config": without_path(config), "results": results}
        content["epochs"] = epochs
        write_json(options.json, content)


def stage_seconds(summaries: Sequence[Summary]) -> dict[str, Any]:
    """Return the statistics of the time of each stage that all runs did themselves, by "<stage> seconds"."""
    return {
        f"{stage} seconds": statistics_of([summary.stages[stage]["seconds"] for summary in summaries])
        for stage in summaries[0].stages
        if all(stage in summary.stages for summary in summaries)
    }


def measured_epochs(entries: Sequence[MetricsEntry]) -> list[dict[str, Any]]:
    """Return the epochs after which something was measured besides the loss: stage, number and figures."""
    found = []
    for entry in entries:
        figures = {key: entry.values[key] for key in CURVES if key in entry.values}
        if figures:
            found.append({"stage": entry.stage, "epoch": entry.epoch, **figures})
    return found


def without_path(config: Config) -> dict[str, Any]:
    """Return the settings without the path of the images, which says something about one machine only."""
    settings: dict[str, Any] = config.model_dump(mode="json")
    if settings["data"]["root"] is not None:
        settings["data"]["root"] = FOLDER
    return settings


if __name__ == "__main__":
    main()
    sys.exit(distributed.end(0))
