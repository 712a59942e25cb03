"""Times every stage of a short run: ``python -m benchmarks.end_to_end --device cpu``.

The default is the digits configuration with few epochs. ``--config`` names another one, ``section.key=value`` words
change it, so ``--config cifar10 pretext.epochs=1`` times one epoch of the real thing.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.events import Events
from scan_fast.runs.folder import RunFolder
from scan_fast.stages.context import Context, open_context
from scan_fast.stages.loop import steps_per_epoch
from scan_fast.stages.pipeline import run_stages, stages_of

from .environment import describe

SHORT = ("pretext.epochs=5", "pretext.monitor_every=0", "clustering.epochs=5", "selflabel.epochs=5")


def views_per_stage(context: Context, config: Config) -> dict[str, int]:
    """Return how many views pass the network in the training of each stage (two per image in each)."""
    splits = context.splits
    stages: dict[str, Any] = {
        "pretext": (config.pretext, len(splits.pretext or splits.train)),
        "clustering": (config.clustering, len(splits.train)),
        "selflabel": (config.selflabel, len(splits.train)),
    }
    return {
        name: 2 * stage.epochs * steps_per_epoch(images, stage.batch_size) * min(stage.batch_size, images)
        for name, (stage, images) in stages.items()
        if stage is not None
    }


def measure(config: Config, folder: Path) -> dict[str, Any]:
    """Run all stages once and return seconds and rates per stage."""
    run = RunFolder.open(folder, config)
    with run:
        context = open_context(config, run, Events(run, quiet=True))
        run_stages(context, stages_of(context))
        views = views_per_stage(context, config)
    stages: dict[str, Any] = {}
    for name, entry in run.summary()["stages"].items():
        stages[name] = {"seconds": entry["seconds"]}
        if name in views:
            stages[name] |= {"views": views[name], "views_per_second": views[name] / max(entry["seconds"], 1e-9)}
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", default="digits", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_args()
    changes = {"runtime.device": options.device, "evaluation.baselines": False}
    config = load_config(find_config(options.config), [*SHORT, *options.overrides], changes)
    with tempfile.TemporaryDirectory() as temporary:
        stages = measure(config, Path(temporary) / "run")
    print(f"{config.name}, {config.preset}, {options.device}")
    for name, entry in stages.items():
        rate = f"{entry['views_per_second']:12,.0f} views/s" if "views_per_second" in entry else ""
        print(f"  {name:<12} {entry['seconds']:9.2f} s {rate}")
    print(f"  {'all':<12} {sum(entry['seconds'] for entry in stages.values()):9.2f} s")
    if options.json:
        result = {"environment": describe(options.device), "config": config.model_dump(mode="json"), "stages": stages}
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
