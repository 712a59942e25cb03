"""The commands of the command line. Each imports what it needs, so that ``--help`` and ``info`` start fast."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import queries, reference_evaluation
from .errors import ConfigError, RunError, UsageError, WeightsError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .data.sources import Source
    from .predictor import Predictor
    from .reference import Embedder
    from .runs.config import Config
    from .runs.folder import RunFolder


def train(options: argparse.Namespace) -> int:
    """Run all stages, or one."""
    from .planning import estimate
    from .runs.artifacts import CONFIG
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import forget, preceding, print_summary, run_stages, stages_of
    from .training.context import open_context
    from .training.images import check_images

    config, folder = _configuration(options)
    folder = options.out or folder
    if options.finish:
        from .finishing import finish_early

        with RunFolder.existing(folder) as unfinished:
            finish_early(unfinished, quiet=options.quiet)
        return 0
    if options.minutes is not None:
        config = _fitted(config, folder, options)
    if options.again and RunFolder(folder).has(CONFIG):
        # Repeating is the one way to change a configuration: only what is done again may differ.
        run = RunFolder.existing(folder)
        _check_again(run.read(CONFIG), config, options.stages)
    else:
        run = RunFolder.open(folder, config)
    with run:
        tracker = Tracker(run, quiet=options.quiet, tensorboard=config.runtime.tensorboard)
        # Repeating all stages may be on other images: nothing that was learned of the former ones stays.
        afresh = options.again and tuple(options.stages) in ((), ("pretext",))
        context = open_context(config, run, tracker, other_images=afresh)
        names = list(options.stages) or stages_of(context)
        if names[0] not in stages_of(context):
            why = "selflabel: null" if config.clustering.weights is None else "clustering.weights takes its place"
            raise UsageError(f"this configuration has no {names[0]} stage ({why})")
        if options.again:
            forget(context, names[0])
            run.write(CONFIG, config)
        names = [*preceding(context, names), *names]
        if afresh:
            check_images(run, context.clustered.values())
        groups = "a suggested number of" if context.suggests_number else context.n_clusters
        backbone = context.model_config.backbone
        tracker.say(f"{config.name}: {context.counts}, {groups} clusters, {backbone} on {context.device}, {run.path}")
        expected = estimate(context, run.summary().stages) if not options.stages else None
        if expected is not None:
            tracker.say(f"time: {expected}; --minutes M fits it into M minutes, Ctrl-C and --finish end it early")
        run_stages(context, names)
        print_summary(context, tracker)
    return 0


def _configuration(options: argparse.Namespace) -> tuple[Config, Path]:
    """Return the configuration and the run folder that the command line names."""
    from .data.datasets import settings_for
    from .runs.artifacts import CONFIG
    from .runs.config import change_config, find_config, load_config, parse_override
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
        queries.check_data_folder(options.data)
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
        changed = [*changes.items(), *map(parse_override, options.overrides)]
        return change_config(RunFolder.existing(path).read(CONFIG), changed), path
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
        print(start.text)
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
    with TemporaryDirectory(prefix="scan-fast-") as temporary, RunFolder.open(Path(temporary) / "run", config) as trial:
        context = open_context(config, trial, Tracker(trial, quiet=True))
        fitted = build_config(fit_minutes(context, options.minutes).model_dump(mode="json"))
    if not options.quiet and (changed := differences(config, fitted)):
        print(f"for {options.minutes:g} minutes: {'; '.join(changed)}")
    return fitted


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
    config, folder = _configuration(options)
    folder = options.out or folder
    run = RunFolder.existing(folder) if RunFolder(folder).has(EMBEDDINGS) else RunFolder.open(folder, config)
    with run:
        tracker = Tracker(run, quiet=options.quiet)
        context = open_context(run.read(CONFIG), run, tracker)
        run_stages(context, ["pretext", "mining"])
        if not run.has(SUGGESTION):
            run_number(context)
        found = run.read(SUGGESTION)
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
            print(f"suggested: {found.k} groups; scan-fast run --data FOLDER --clusters {found.k}")
    return 0


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
    """Measure every finished stage of a run, or the finished model on other images."""
    if options.config is not None:
        return reference_evaluation.evaluate_reference(options)
    with _no_reference(options):
        if options.data is not None:
            return queries.evaluate_on(options)
        if options.target.is_file():
            raise UsageError(f"{options.target} is a file: a model is measured on the images that --data names")
    from .evaluating import check_prototypes, evaluate_run
    from .runs.artifacts import CONFIG
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .training.context import open_context

    check_prototypes(options.prototypes)
    if options.device is not None:
        raise UsageError("--device goes with --data; a run is measured on its runtime.device")
    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run, quiet=options.json)
        context = open_context(run.read(CONFIG), run, tracker)
        evaluate_run(context, as_json=options.json, prototypes=options.prototypes)
    return 0


def probe(options: argparse.Namespace) -> int:
    """Measure linear classifiers that learn from few labels, on the frozen features of a run."""
    from .probing import command

    return command(options)


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
    print(_configuration(options)[0].to_yaml(), end="")
    return 0


def predict(options: argparse.Namespace) -> int:
    """Write the clusters of new images."""
    from dataclasses import replace

    from .atomic import atomic_file
    from .predictor import Predictor
    from .runs.artifacts import ASSIGNMENTS
    from .runs.folder import RunFolder
    from .runs.tables import Placements

    predictor, source = _network_and_source(options)
    assert isinstance(predictor, Predictor)
    probabilities, features = predictor.outputs(source)
    similarity: NDArray[np.float32] | None = None
    unlike: NDArray[np.bool_] | None = None
    if predictor.typicality is not None:
        found, nearest = predictor.typicality.nearest(features)
        similarity, unlike = found.numpy(), predictor.typicality.unlike(found, nearest).numpy()
    table = Placements.of_new(source.paths, probabilities, similarity, unlike)
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

    network, source = _network_and_source(options)
    features = network.features(source).numpy()
    with atomic_file(options.out) as file:
        np.savez(file, features=features, paths=np.array(source.paths))
    return 0


def _network(options: argparse.Namespace, device: torch.device) -> Predictor | Embedder:
    """Return the model of a run folder, a model.pt or, with --config, a file of the reference."""
    from .predictor import Predictor
    from .reference import open_reference

    if options.config is None:
        with _no_reference(options):
            return Predictor.load(options.target, device)
    file = open_reference(options.target, options.config, options.overrides, options.head)
    embeds = options.command == "embed" and file.is_pretext and options.head is None
    network = file.embedder(device) if embeds else file.predictor(options.head, device)
    print(file.describe(network.form), file=sys.stderr)
    return network


@contextmanager
def _no_reference(options: argparse.Namespace) -> Iterator[None]:
    """Refuse words that go with --config, and say so if the target turns out to be a file that needs it."""
    from .models.reference_checkpoints import read_original

    for name in ("head", "neighbors"):
        if getattr(options, name, None) is not None:
            raise UsageError(f"--{name} goes with --config, for a weight file of the SCAN project")
    try:
        yield
    except (WeightsError, UsageError):
        if not options.target.is_file():
            raise
        with suppress(WeightsError):
            kind = read_original(options.target).kind
            raise UsageError(
                f"{options.target} is a {kind} file of the SCAN project: say with --config what its network sees, such "
                "as --config cifar10"
            ) from None
        raise


def _network_and_source(options: argparse.Namespace) -> tuple[Predictor | Embedder, Source]:
    from .devices import choose_device

    images = _images(options.data)
    network = _network(options, choose_device(options.device, "--device"))
    source = network.source(images, options.on_error, "--data")
    if source.skipped:
        path, reason = source.skipped[0]
        print(f"left out {len(source.skipped)} unreadable images, the first is {path}: {reason}", file=sys.stderr)
    return network, source


def _images(words: Sequence[str]) -> str | list[str]:
    """Return what --data names: a folder or PREFIX:ARGUMENT, or a list of files."""
    from .data.kinds import is_prefixed

    if len(words) == 1 and (is_prefixed(words[0]) or Path(words[0]).expanduser().is_dir()):
        return words[0]
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir() or is_prefixed(word):
            raise UsageError(f"--data: give one folder or source, or files only; got {word} among {len(words)}")
        if not path.is_file():
            raise UsageError(f"--data: there is no file or folder {word}")
    repeated = {word for word in words if words.count(word) > 1}
    if repeated:
        raise UsageError(f"--data: each file must be given once, got {min(repeated)} again")
    return list(words)


def export(options: argparse.Namespace) -> int:
    """Write a model that runs without this package."""
    import torch

    from .export import export
    from .predictor import Predictor
    from .reference_export import export_reference

    if options.format == "reference":
        if options.config is not None:
            raise UsageError(f"--format reference writes a run's model; {options.target} is in this format already")
        with _no_reference(options):
            export_reference(options.target, options.out, options.stage)
        return 0
    if options.stage is not None:
        raise UsageError("--stage goes with --format reference")
    predictor = _network(options, torch.device("cpu"))
    assert isinstance(predictor, Predictor)
    export(predictor, options.out, options.format)
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
    from .runs.artifacts import ASSIGNMENTS, NAMES, REPORT
    from .runs.folder import RunFolder
    from .runs.names import GroupNames, parse_group, parse_names
    from .runs.tracker import Tracker

    if options.list and (options.clear or options.names):
        raise UsageError("--list goes with nothing else")
    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run)
        table = run.read(ASSIGNMENTS)
        n_groups = run.n_groups(table)
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
