"""The commands that train, print a configuration, measure kernels, or say what was built.

Each imports what it needs, so that ``--help`` and ``info`` start fast.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import data_option, distributed, queries
from .errors import ConfigError, RunError, UsageError, WeightsError
from .text import show, shown_lines

if TYPE_CHECKING:
    from .runs.config import Config
    from .runs.folder import RunFolder


def train(options: argparse.Namespace) -> int:
    """Run all stages, or one."""
    from .planning import estimate, processor_advice
    from .runs.artifacts import CONFIG
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import forget, preceding, print_summary, run_stages, stages_of
    from .training.context import open_context
    from .training.images import check_images

    # Rank 0 reads the configuration, and the run folder that may hold it, for all.
    config, folder = distributed.on_first(lambda: _configuration(options))
    folder = options.out or folder
    if options.finish:
        from .finishing import finish_early

        with RunFolder.existing(folder) as unfinished:
            _check_finish(options, unfinished, config)
            finish_early(unfinished, quiet=options.quiet)
        return 0
    if options.minutes is not None:
        config = distributed.on_first(lambda: _fitted(config, folder, options))
    # A launcher that starts failed processes again means them to go on.
    options.again = options.again and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    if options.again and RunFolder(folder).has(CONFIG):
        # Repeating is the one way to change a configuration: only what is done again may differ.
        run = RunFolder.existing(folder)
        _check_again(run.read(CONFIG), config, options.stages)
    else:
        run = RunFolder.open(folder, config)
    mines_again = options.again and tuple(options.stages) in ((), ("pretext",), ("mining",))
    _check_neighbors(config, run, mines_again)
    with run:
        tracker = Tracker(run, quiet=options.quiet, tensorboard=config.runtime.tensorboard)
        # Repeating all stages may be on other images: nothing that was learned of the former ones stays.
        afresh = options.again and tuple(options.stages) in ((), ("pretext",))
        context = open_context(config, run, tracker, other_images=afresh)
        names = list(options.stages) or stages_of(context)
        if (why := config.why_without(names[0])) is not None:
            raise UsageError(f"this configuration has no {names[0]} stage ({why})")
        if options.again:
            forget(context, names[0])
            run.write(CONFIG, config)
        names = [*preceding(context, names), *names]
        if afresh:
            check_images(run, context.used, config.data.identity)
        groups = "a suggested number of" if context.suggests_number else context.n_clusters
        backbone = context.model_config.backbone
        tracker.say(f"{config.name}: {context.counts}, {groups} clusters, {backbone} on {context.device}, {run.path}")
        # An estimate times one process.
        alone = not options.stages and not distributed.several()
        expected = estimate(context, run.summary().stages) if alone else None
        if expected is not None:
            tracker.say(f"time: {expected}; --minutes M fits it into M minutes, Ctrl-C and --finish end it early")
            # Who has chosen a preset or minutes, or goes on with a run, has decided.
            chosen = options.minutes is not None or any(word.startswith("preset=") for word in options.overrides)
            if not chosen and not run.summary().stages:
                advice = processor_advice(context, expected, _presets(options))
                if advice is not None:
                    tracker.say(advice)
        run_stages(context, names)
        print_summary(context, tracker)
    return 0


def _check_finish(options: argparse.Namespace, run: RunFolder, config: Config) -> None:
    """Refuse what --finish would leave out: it groups with the settings of the run."""
    from .runs.artifacts import CONFIG
    from .runs.config import differences

    if options.minutes is not None or options.again:
        option = "--again" if options.again else "--minutes"
        raise UsageError(f"--finish trains nothing, so {option} has no effect; leave it out")
    changed = differences(run.read(CONFIG), config)
    if changed:
        raise UsageError(
            f"--finish groups with the settings of {run.path}, so what differs has no effect ({'; '.join(changed)}); "
            f"give the folder alone: scan-fast run {run.path} --finish"
        )


def _check_neighbors(config: Config, run: RunFolder, mines_again: bool = False) -> None:
    """Check the files of neighbours that a run is to take, before anything of it is written."""
    from .stages.beforehand import check_beforehand

    if config.mining.files is not None and (mines_again or not run.finished("mining")):
        check_beforehand(config)


def _configuration(options: argparse.Namespace) -> tuple[Config, Path]:
    """Return the configuration and the run folder that the command line names."""
    from .data.datasets import settings_for
    from .runs.artifacts import CONFIG
    from .runs.config import change_config, find_config, load_config, parse_override
    from .runs.effects import check_effects
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
        data_option.check_folder(options.data)
        started = getattr(options, "start", None) is not None
        changes |= settings_for(options.data) | ({"preset": "fast"} if started else _start(options))
        target = "folder"
    if target is None:
        raise ConfigError("say what to run: a configuration such as digits, or --data FOLDER")
    changes |= _given_files(options)
    path = Path(target).expanduser()
    if options.data is None and path.is_dir():
        if not RunFolder(path).has(CONFIG):
            raise RunError(
                f"{path} is no run folder (it has no {CONFIG.name}); to group the images in it, give --data {path}"
            )
        given = list(map(parse_override, options.overrides))
        config = change_config(RunFolder.existing(path).read(CONFIG), [*changes.items(), *given])
        check_effects(config, given)
        return config, path
    found = find_config(target)
    if "clustering.weights" in changes:
        # What the configuration says itself must agree with the file.
        words = [word for word in options.overrides if not word.startswith("clustering.weights_head=")]
        own = load_config(found, words, {k: v for k, v in changes.items() if k == "preset"})
        n_clusters = changes["clustering.n_clusters"]
        stated = own.clustering.n_clusters if options.clusters is None else options.clusters
        if isinstance(stated, int) and stated != n_clusters:
            raise WeightsError(
                f"{options.start} has {n_clusters} clusters, the configuration has clustering.n_clusters={stated}; "
                f"clustering.n_clusters={n_clusters} takes the file's"
            )
    config = load_config(found, options.overrides, changes)
    check_effects(config, map(parse_override, options.overrides))
    name = _run_name(config)
    if getattr(options, "start", None) is not None:
        name += f"-from-{options.start.name.partition('.')[0]}"
    return config, Path("runs") / name


def _given_files(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that --from and --neighbors stand for."""
    from .models.reference_checkpoints import read_original
    from .reference import settings_from
    from .runs.config import parse_override

    changes: dict[str, Any] = {}
    if getattr(options, "neighbors", None) is not None:
        changes["mining.files"] = [str(file.expanduser().absolute()) for file in options.neighbors]
    file = getattr(options, "start", None)
    if file is None:
        return changes
    original = read_original(file.expanduser())
    needs_heads = "selflabel" in options.stages
    if needs_heads and not original.n_heads:
        raise UsageError(
            f"--from: {file} is a {original.kind} file, which has no cluster heads; scan-fast cluster goes on from it"
        )
    if options.stages and not needs_heads and original.n_heads:
        raise UsageError(f"--from: {file} has cluster heads; scan-fast selflabel goes on from it")
    if original.n_heads and "mining.files" in changes:
        raise UsageError(f"--neighbors: nothing is mined after {file}, which has cluster heads")
    head = dict(map(parse_override, options.overrides)).get("clustering.weights_head")
    if original.n_heads and original.head is None and head is None:
        raise WeightsError(
            f"--from: {file} has {original.n_heads} cluster heads and does not say which is the best: name one with "
            f"clustering.weights_head=H, H from 0 to {original.n_heads - 1} (`scan-fast evaluate {file} --config` "
            "compares them)"
        )
    changes |= settings_from(file, original)
    if options.data is not None and original.architecture == "resnet50":
        changes["model.backbone"] = "resnet50"
    return changes


def _start(options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of what a run on a folder starts from, and say so."""
    from .devices import choose_device
    from .planning import choose_start
    from .runs.config import parse_override

    given = dict(map(parse_override, options.overrides))
    model = {key.partition(".")[2]: value for key, value in given.items() if key.startswith("model.")}
    device = choose_device(str(given.get("runtime.device", "auto"))).type
    start = choose_start(given, model, device)
    if start is None:
        return {}
    if start.text and not getattr(options, "quiet", False):
        show(start.text)
    return dict(start.settings)


def _fitted(config: Config, folder: Path, options: argparse.Namespace) -> Config:
    """Return the configuration that fits into --minutes: that of the run if it was begun before."""
    from tempfile import TemporaryDirectory

    from .planning import fit_minutes
    from .runs.artifacts import CONFIG
    from .runs.config import build_config, differences
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .training.context import open_context

    if options.stages or options.again:
        raise UsageError("--minutes goes with a whole run from its beginning")
    if config.clustering.weights is not None:
        raise UsageError(
            "--minutes shortens a run from its beginning; after cluster heads of a file set selflabel.epochs"
        )
    run = RunFolder(folder)
    if run.has(CONFIG):
        return run.read(CONFIG)
    known = _presets(options)
    if not config.pretext.method.trains:
        why = f"pretext.method={config.pretext.method.kind} trains nothing that could be shortened"
        if any(word.startswith(("preset=", "pretext", "model.")) for word in options.overrides):
            raise UsageError(f"--minutes {options.minutes:g} has no effect: {why}; leave it out")
        if not options.quiet:
            print(f"--minutes {options.minutes:g} has no effect: {why}")
        return config
    with TemporaryDirectory(prefix="scan-fast-") as temporary, RunFolder.open(Path(temporary) / "run", config) as trial:
        context = open_context(config, trial, Tracker(trial, quiet=True))
        fitted = build_config(fit_minutes(context, options.minutes, known).model_dump(mode="json"))
    if not options.quiet and (changed := differences(config, fitted)):
        show(f"for {options.minutes:g} minutes: {'; '.join(changed)}")
    return fitted


def _presets(options: argparse.Namespace) -> list[str]:
    """Return the presets of the configuration that the command line names; a run folder has none."""
    from .runs.config import find_config, presets_of

    if options.data is None and Path(options.target).expanduser().is_dir():
        return []
    return presets_of(find_config("folder" if options.data is not None else options.target))


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


def suggest_k(options: argparse.Namespace) -> int:
    """Suggest a number of groups."""
    from .runs.artifacts import CONFIG, EMBEDDINGS, SUGGESTION
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.number import run_number
    from .stages.pipeline import run_stages
    from .training.context import open_context

    if options.clusters is not None:
        raise UsageError("suggest-k finds the number of groups itself; leave --clusters out")
    options.clusters = "auto"
    config, folder = distributed.on_first(lambda: _configuration(options))
    folder = options.out or folder
    run = RunFolder.existing(folder) if RunFolder(folder).has(EMBEDDINGS) else RunFolder.open(folder, config)
    _check_neighbors(config, run)
    with run:
        tracker = Tracker(run, quiet=options.quiet)
        context = open_context(run.read(CONFIG), run, tracker)
        run_stages(context, ["pretext", "mining"])
        if not run.has(SUGGESTION):
            run_number(context)
        found = run.read(SUGGESTION)
        command = f"scan-fast run {options.target}" if options.data is None else f"scan-fast run --data {options.data}"
        if options.target is not None and Path(options.target).expanduser().is_dir():
            command = f"scan-fast cluster {options.target} --again"
        rows = [
            [
                str(point["k"]),
                f"{point['score']:.3f}",
                f"{point['stability']:.3f}",
                point["way"],
                "<" * (point["k"] == found.k),
            ]
            for point in found.curve
        ]
        if options.json:
            print(json.dumps({"k": found.k, "curve": found.curve}, indent=2))
        else:
            tracker.table("numbers of groups", ["K", "score", "stability", "best way", ""], rows)
            show(f"suggested: {found.k} groups; {command} --clusters {found.k} makes them")
    return 0


def config(options: argparse.Namespace) -> int:
    """Print a resolved configuration, the shipped ones, or the keys."""
    if options.list and options.keys is not None:
        raise UsageError("give --list or --keys, not both")
    if options.list or options.keys is not None:
        if options.target is not None or options.data is not None or options.overrides:
            option = "--list" if options.list else "--keys"
            raise UsageError(f"{option} shows no configuration; leave out {option} to print one with its values")
        print(queries.list_configs() if options.list else queries.list_keys(options.keys))
        return 0
    if options.target is None and options.data is None:
        options.target = "folder"
    content = _configuration(options)[0].to_yaml()
    print(shown_lines(content) if sys.stdout.isatty() else content, end="")
    return 0


SOURCE = Path(__file__).resolve().parents[1]
"""The source repository, if the package is imported from one."""


def benchmarks() -> dict[str, str]:
    """Return name and description of each benchmark; empty if the package is not imported from its repository."""
    import runpy

    table = SOURCE / "benchmarks" / "__init__.py"
    return dict(runpy.run_path(str(table))["BENCHMARKS"]) if table.is_file() else {}


def bench(options: argparse.Namespace) -> int:
    """Run a benchmark in another process."""
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
