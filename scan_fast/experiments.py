"""The commands that do several runs and compare them. Each imports what it needs, as in :mod:`.commands`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import UsageError
from .text import show

MOST_SEEDS = 5
"""Largest number of seeds whose values have a column each; all of them are in sweep.json."""


def sweep(options: argparse.Namespace) -> int:
    """Run one configuration with several seeds."""
    from .runs.config import find_config, load_config, parse_override
    from .runs.effects import check_effects
    from .runs.tracker import print_table
    from .sweep import sweep

    seeds = parse_seeds(options.seeds)
    config = load_config(find_config(options.target), options.overrides)
    check_effects(config, map(parse_override, options.overrides))
    parent = options.out or Path("runs") / f"{config.name}-{config.preset or 'run'}-sweep"
    quiet = options.quiet or options.json
    results = sweep(
        config,
        seeds,
        parent.expanduser(),
        quiet=quiet,
        share_pretext=options.share_pretext,
        shared=options.shared,
    )
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    shown = seeds if len(seeds) <= MOST_SEEDS else []
    columns = ["", "mean", "std", "best", *(f"seed {seed}" for seed in shown)]
    rows = [
        [
            name,
            f"{entry['mean']:.4f}",
            f"{entry['std']:.4f}",
            f"{entry['best']:.4f} (seed {entry['best_seed']})" if "best" in entry else "",
            *(f"{value:.4f}" for value in entry["values"] if shown),
        ]
        for name, entry in results.items()
        if name != "seeds"
    ]
    print_table(f"{config.name}, seeds {options.seeds}", columns, rows)
    print(_seconds(results["seconds"]))
    return 0


def ablate(options: argparse.Namespace) -> int:
    """Compare variants of one configuration."""
    from .ablation import cells, configure, find_ablation, list_ablations, run_ablation
    from .runs.config import find_config
    from .runs.tracker import print_table

    if options.list:
        if options.name is not None or options.overrides:
            raise UsageError("--list goes with nothing else")
        print(list_ablations())
        return 0
    if options.name is None:
        raise UsageError("say which ablation, such as: scan-fast ablate threshold digits; --list lists them")
    seeds = parse_seeds(options.seeds)
    ablation = find_ablation(options.name).only(options.variants)
    config = configure(ablation, find_config(options.target), options.overrides)
    parent = options.out or Path("runs") / f"{config.name}-{config.preset or 'run'}-{ablation.name}"
    results = run_ablation(
        ablation,
        config,
        seeds,
        parent.expanduser(),
        share_pretext=options.share_pretext,
        shared=options.shared,
        quiet=options.quiet or options.json,
    )
    if options.json:
        print(json.dumps(results, indent=2))
        return 0
    print_table(f"{ablation.title}: {config.name}, seeds {options.seeds}", *cells(results))
    print(_seconds(results["seconds"]))
    show(f"written to {parent}: ablation.json, ablation.csv")
    return 0


def _seconds(seconds: dict[str, Any]) -> str:
    """Return in words the time that all runs took."""
    shared = seconds.get("shared", {})
    once = f", of which {sum(shared.values()):.1f} s for stages that were shared, counted once" if shared else ""
    return f"all runs: {seconds['total']:.1f} s{once}"


def parse_seeds(text: str) -> list[int]:
    """Read the value of --seeds.

    Raises:
        UsageError: if it names no seed, or one twice.
    """
    seeds: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.partition("-")
            seeds.extend(range(int(first), int(last if dash else first) + 1))
    except ValueError:
        raise UsageError(f"--seeds must look like 0-9 or 0,3,7, got {text!r}") from None
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError(f"--seeds must name at least one seed, each once, got {text!r}")
    return seeds
