"""The commands of the command line. Each imports what it needs, so that ``--help`` and ``info`` start fast."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigError, RunError, UsageError

if TYPE_CHECKING:
    from .data.sources import Source
    from .predictor import Predictor
    from .runs.config import Config
    from .runs.folder import RunFolder


def train(options: argparse.Namespace) -> int:
    """Run all stages, or one."""
    from .runs.artifacts import CONFIG
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import forget, print_summary, run_stages, stages_of
    from .training.context import open_context

    config, folder = _configuration(options)
    if options.again and RunFolder(folder).has(CONFIG):
        # Repeating is the one way to change a configuration: only what is done again may differ.
        run = RunFolder.existing(folder)
        _check_again(run.read(CONFIG), config, options.stages)
    else:
        run = RunFolder.open(folder, config)
    with run:
        tracker = Tracker(run, quiet=options.quiet, tensorboard=config.runtime.tensorboard)
        context = open_context(config, run, tracker)
        names = list(options.stages) or stages_of(context)
        if names[0] not in stages_of(context):
            raise UsageError(f"this configuration has no {names[0]} stage (selflabel: null)")
        if options.again:
            forget(context, names[0])
            run.write(CONFIG, config)
        tracker.say(
            f"{config.name}: {len(context.splits.train)} training and {len(context.splits.test)} test images, "
            f"{context.n_clusters} clusters, {context.model_config.backbone} on {context.device}, {run.path}"
        )
        run_stages(context, names)
        print_summary(context, tracker)
    return 0


def _configuration(options: argparse.Namespace) -> tuple[Config, Path]:
    """Return the configuration and the run folder that the command line names."""
    from .data.datasets import settings_for
    from .runs.artifacts import CONFIG
    from .runs.config import build_config, find_config, load_config, merge, nested, parse_override
    from .runs.folder import RunFolder

    target = options.target
    changes: dict[str, Any] = {}
    if options.clusters is not None:
        changes["clustering.n_clusters"] = options.clusters
    if options.data is not None:
        if target is not None:
            raise ConfigError(
                f"give either a configuration ({target}) or --data, not both; a folder goes with data.root="
            )
        changes |= settings_for(options.data)
        target = "folder"
    if target is None:
        raise ConfigError("say what to run: a configuration such as digits, or --data FOLDER --clusters K")
    path = Path(target).expanduser()
    if options.data is None and path.is_dir():
        values: dict[str, Any] = RunFolder.existing(path).read(CONFIG).model_dump(mode="json")
        for key, value in [*changes.items(), *map(parse_override, options.overrides)]:
            values = merge(values, nested(key, value))
        return build_config(values), options.out or path
    config = load_config(find_config(target), options.overrides, changes)
    return config, options.out or Path("runs") / _run_name(config)


def _run_name(config: Config) -> str:
    parts = [config.name, config.preset, f"seed{config.seed}"]
    if config.clustering.n_clusters is not None:
        parts.insert(1, str(config.clustering.n_clusters))
    return "-".join(part.replace("/", "_") for part in parts if part)


def _check_again(old: Config, new: Config, stages: Sequence[str]) -> None:
    from .runs.config import differences
    from .stages.pipeline import STAGES

    order = list(STAGES)
    again = order[order.index(stages[0]) :] if stages else order
    kept = [d for d in differences(old, new) if d.partition(".")[0] not in (*again, "evaluation")]
    if stages and kept:
        raise RunError(f"--again repeats {', '.join(again)}, which {'; '.join(kept)} does not belong to")


def evaluate(options: argparse.Namespace) -> int:
    """Measure every finished stage of a run."""
    from .runs.artifacts import CONFIG
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import evaluate, print_summary
    from .training.context import open_context

    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run, quiet=options.json)
        context = open_context(run.read(CONFIG), run, tracker)
        results = evaluate(context)
        if options.json:
            print(json.dumps(results.to_dict(), indent=2))
        else:
            print_summary(context, tracker)
    return 0


def predict(options: argparse.Namespace) -> int:
    """Write the clusters of new images."""
    from dataclasses import replace

    from .atomic import atomic_file
    from .runs.artifacts import ASSIGNMENTS
    from .runs.folder import RunFolder
    from .runs.tables import Predictions

    predictor, source = _predictor_and_source(options)
    table = Predictions.of(source.paths, predictor.probabilities(source))
    run = RunFolder(options.target if options.target.is_dir() else options.target.parent)
    if run.has(ASSIGNMENTS):
        table = replace(table, names=run.group_names(run.read(ASSIGNMENTS)))
    if options.out is None:
        sys.stdout.write(table.to_csv())
    else:
        with atomic_file(options.out) as file:
            table.dump(file)
    return 0


def embed(options: argparse.Namespace) -> int:
    """Write the feature vectors of images."""
    import numpy as np

    from .atomic import atomic_file

    predictor, source = _predictor_and_source(options)
    features = predictor.features(source).numpy()
    with atomic_file(options.out) as file:
        np.savez(file, features=features, paths=np.array(source.paths))
    return 0


def _predictor_and_source(options: argparse.Namespace) -> tuple[Predictor, Source]:
    from .devices import choose_device
    from .predictor import Predictor

    predictor = Predictor.load(options.target, choose_device(options.device, "--device"))
    return predictor, predictor.source(options.data)


def export(options: argparse.Namespace) -> int:
    """Write a model that runs without this package."""
    from .export import export
    from .predictor import Predictor

    export(Predictor.load(options.target), options.out, options.format)
    return 0


def report(options: argparse.Namespace) -> int:
    """Write report.html again."""
    from .report import write_report
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker

    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run)
        name, sources = _images_of(run)
        page = write_report(run, sources, title=name, thumbnails=options.thumbnails, single_file=options.single_file)
        tracker.say(str(page))
    return 0


def _images_of(run: RunFolder) -> tuple[str, dict[str, Source]]:
    """Return the name of a run and its images by split, to look at; nothing is decoded that need not be.

    Raises:
        RunError: if the run has no assignments yet, or a file is damaged.
        DataError: if the images are no longer there.
    """
    from .data.datasets import open_splits
    from .data.decode_cache import DecodeCache
    from .runs.artifacts import ASSIGNMENTS, CONFIG, DECODE_CACHE

    run.read(ASSIGNMENTS)
    config = run.read(CONFIG)
    known = run.read(DECODE_CACHE) if run.has(DECODE_CACHE) else DecodeCache()
    splits = open_splits(config.data.model_copy(update={"resident": "files"}), known)
    both = {"train": splits.train, "test": splits.test}
    return config.name, {split: source for split, source in both.items() if source is not None}


def name(options: argparse.Namespace) -> int:
    """Name groups, list the names or remove them, and write the tables and the report with them."""
    from .errors import ScanFastError
    from .report import write_report
    from .runs.artifacts import ASSIGNMENTS, CONFIG, NAMES, REPORT
    from .runs.folder import RunFolder
    from .runs.names import GroupNames, parse_group, parse_names
    from .runs.tracker import Tracker

    if options.list and (options.clear or options.names):
        raise UsageError("--list goes with nothing else")
    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run)
        table = run.read(ASSIGNMENTS)
        # The last groups may be empty.
        n_groups = max(int(table.clusters.max(initial=-1)) + 1, run.read(CONFIG).clustering.n_clusters or 0)
        aside = run.set_names_aside(table)
        if aside is not None:
            tracker.say(f"the names were of another grouping; they are in {aside.name} now")
        names = run.group_names(table)
        if options.list or (not options.names and not options.clear):
            for group, text in sorted(names.items()):
                print(f"{group}\t{text}")
            return 0
        if options.clear:
            cleared = {parse_group(word, n_groups) for word in options.names} or set(names)
            names = {group: text for group, text in names.items() if group not in cleared}
        else:
            names |= parse_names(options.names, n_groups)
        run.write(NAMES, GroupNames(table.digest, names))
        run.write_assignments(table)
        if run.has(REPORT):
            try:
                title, sources = _images_of(run)
                write_report(run, sources, title=title)
            except ScanFastError as error:
                tracker.say(f"the names are kept, but the report cannot be written again: {error}")
        tracker.say(f"{len(names)} of {n_groups} groups have a name")
    return 0


def folders(options: argparse.Namespace) -> int:
    """Sort the images into one folder per group, as links or copies."""
    from .report.folders import write_folders
    from .runs.folder import RunFolder

    run = RunFolder.existing(options.target)
    _, sources = _images_of(run)
    counts = write_folders(run, sources, options.out.expanduser(), "copy" if options.copy else "link")
    for folder, count in counts.items():
        print(f"{count:>8}  {options.out / folder}")
    return 0


def sweep(options: argparse.Namespace) -> int:
    """Run one configuration with several seeds."""
    from .runs.config import find_config, load_config
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .sweep import sweep

    seeds = _seeds(options.seeds)
    config = load_config(find_config(options.target), options.overrides)
    parent = options.out or Path("runs") / f"{config.name}-{config.preset or 'run'}-sweep"
    results = sweep(config, seeds, parent, quiet=options.quiet)
    Tracker(RunFolder(parent)).table(
        f"{config.name}, seeds {options.seeds}",
        ["", "mean", "std", *(f"seed {seed}" for seed in seeds)],
        [
            [name, f"{entry['mean']:.4f}", f"{entry['std']:.4f}", *(f"{value:.4f}" for value in entry["values"])]
            for name, entry in results.items()
            if name != "seeds"
        ],
    )
    return 0


def _seeds(text: str) -> list[int]:
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


SOURCE = Path(__file__).resolve().parents[1]
"""The source repository, if the package is imported from one."""


def benchmarks() -> dict[str, str]:
    """Return name and description of each benchmark; empty if the package is not imported from its repository."""
    import runpy

    table = SOURCE / "benchmarks" / "__init__.py"
    return dict(runpy.run_path(str(table))["BENCHMARKS"]) if table.is_file() else {}


def bench(options: argparse.Namespace) -> int:
    """Run a benchmark in another process."""
    import os
    import subprocess

    names = benchmarks()
    if not names:
        raise UsageError(
            "the benchmarks are part of the source repository, not of the installed package: clone it, "
            "`pip install --no-build-isolation -e .` there, and give the same command again"
        )
    if options.name not in names:
        raise UsageError(f"bench must be one of {', '.join(names)}, got {options.name!r}")
    path = os.pathsep.join(filter(None, (str(SOURCE), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"benchmarks.{options.name}", *options.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def info(options: argparse.Namespace) -> int:
    """Print what was built, or test the kernels."""
    if options.device is not None and not options.check:
        raise UsageError("--device goes with --check")
    if options.check:
        return _check_kernels(options)
    from .info import collect, render

    facts = collect()
    print(json.dumps(facts, indent=2) if options.json else render(facts))
    return 0


def _check_kernels(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .ops.check import check, device_of, table

    device = device_of(options.device or "cuda")
    rows = list(check(device))
    if options.json:
        found = [{"family": family, "kernels": kernels, **asdict(verdict)} for family, kernels, verdict in rows]
        print(json.dumps(found, indent=2))
    else:
        print(table(rows, device))
    return 0 if all(verdict.passed for _, _, verdict in rows) else 1
