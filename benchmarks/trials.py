"""Compares recipes: the effect of changes of a configuration on quality, and their cost in CPU time.

    python -m benchmarks.trials --config digits --until mining --seeds 0 1 2 --json FILE -- \\
        "base" "one-sided: pretext.method.anchors=first"

A trial is ``NAME: section.key=value ...``, or a name alone for the configuration as it is. The seeds of all trials
alternate. Stages that two trials share run once (their folders are in ``--work``), and their cost counts for both. The
cost is CPU time of all threads of the process, so that a busy machine matters little. An existing ``--json`` file is
continued: only what it lacks is run.

Comparing recipes uses labels; training and selection in a run never do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scan_fast.runs.artifacts import CONFIG
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.handover import Handover
from scan_fast.stages.pipeline import STAGES, run_stage
from scan_fast.training.context import open_context

from .environment import describe
from .files import write_json

COLUMNS = {"knn_acc": "kNN", "purity": "purity", "test_purity": "test purity"}
SHARED = ("seed", "precision", "data", "model")


def parse_trial(text: str) -> tuple[str, list[str]]:
    """Split ``NAME: a.b=c d.e=f`` into the name and the changes."""
    name, _, changes = text.partition(":")
    return name.strip(), changes.split()


def stage_key(config: Config, stages: Sequence[str]) -> str:
    """Return a hash of the settings that the given first stages of a run depend on."""
    values = config.model_dump(mode="json")
    parts = {section: values[section] for section in (*SHARED, *stages)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


TRIED = [name for name in STAGES if name != "number"]
"""The stages of a trial, which is given its number of clusters."""


def run_trial(config: Config, stages: Sequence[str], work: Path) -> dict[str, dict[str, float]]:
    """Run the stages, or reuse those of another trial; return metrics and CPU seconds per stage."""
    results: dict[str, dict[str, float]] = {}
    former: Path | None = None
    for number, stage in enumerate(stages, start=1):
        folder = work / stage_key(config, stages[:number])
        if not (folder / "results.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            if former is not None:
                shutil.copytree(former, folder, ignore=shutil.ignore_patterns("results.json", "config.yaml"))
            run = RunFolder(folder)
            with run:
                run.write(CONFIG, config)
                context = open_context(config, run, Tracker(run, quiet=True))
                begin = time.process_time()
                run_stage(context, STAGES[stage], Handover())
                seconds = time.process_time() - begin
                entry = run.summary().stages[stage]
            metrics = {**entry, **entry.get(context.reported, {})}
            wanted = ("knn_acc", "purity", "test_purity", "acc", "nmi")
            results[stage] = {key: float(metrics[key]) for key in wanted if key in metrics}
            results[stage]["cpu_seconds"] = round(seconds, 2)
            write_json(folder / "results.json", results)
        results = json.loads((folder / "results.json").read_text())
        former = folder
    return results


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table with the mean of every figure per trial and, for several seeds, its deviation."""
    trials = result["trials"]
    columns = list(
        dict.fromkeys(
            (stage, key)
            for trial in trials.values()
            for run in trial["seeds"].values()
            for stage, figures in run.items()
            for key in figures
        )
    )
    names = [COLUMNS.get(key, key) if stage in ("pretext", "mining") else f"{stage} {key}" for stage, key in columns]
    names = [f"{stage}, s" if key == "cpu_seconds" else name for (stage, key), name in zip(columns, names, strict=True)]
    rows = [f"| trial | changes | seeds | {' | '.join(names)} |", f"|---|---|---:|{'---:|' * len(names)}"]
    for name, trial in trials.items():
        cells = []
        for stage, key in columns:
            values = [run[stage][key] for run in trial["seeds"].values() if key in run.get(stage, {})]
            mean = statistics.mean(values) if values else float("nan")
            spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append("" if not values else f"{mean:.0f}" if key == "cpu_seconds" else f"{100 * mean:.1f}{spread}")
        changes = f"`{' '.join(trial['changes'])}`" if trial["changes"] else ""
        rows.append(f"| {name} | {changes} | {len(trial['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for all trials")
    parser.add_argument("--until", choices=TRIED, default="mining", help="the last stage to run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, help="keep the stages' folders here")
    parser.add_argument("--json", type=Path, help="also write the result to this file, and continue what it holds")
    parser.add_argument("trials", nargs="+", metavar="NAME: section.key=value ...")
    options = parser.parse_args()
    stages = TRIED[: TRIED.index(options.until) + 1]
    path = find_config(options.config)
    result: dict[str, Any] = {"benchmark": "trials", "config": options.config, "set": options.set, "trials": {}}
    if options.json and options.json.exists():
        result = json.loads(options.json.read_text())
        if result["config"] != options.config or result["set"] != options.set:
            parser.error(f"{options.json} holds trials of {result['config']} with {result['set']}")
    result |= {"device": options.device, "environment": describe(options.device)}
    trials: dict[str, dict[str, Any]] = result["trials"]
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for seed in options.seeds:
            for name, changes in map(parse_trial, options.trials):
                trial = trials.setdefault(name, {"changes": changes, "seeds": {}})
                if trial["changes"] != changes:
                    parser.error(f"{options.json} has another trial named {name!r}: {' '.join(trial['changes'])}")
                if set(stages) <= set(trial["seeds"].get(str(seed), {})):
                    continue
                fixed = {"seed": seed, "runtime.device": options.device, "pretext.monitor_every": 0}
                config = load_config(path, [*options.set, *changes], fixed)
                trial["seeds"][str(seed)] = run_trial(config, stages, work)
                print(f"seed {seed}, {name}: {json.dumps(trial['seeds'][str(seed)])}", flush=True)
                if options.json:
                    write_json(options.json, result)
    print("\n" + table(result))


if __name__ == "__main__":
    main()
