"""The commands that apply a run, a model or a weight file to images, or write a run's results in another form.

Each imports what it needs, as in :mod:`.commands`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from . import data_option, distributed
from .errors import UsageError, WeightsError
from .text import show, shown

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from .data.sources import Source
    from .predictor import Predictor
    from .reference import Embedder
    from .runs.folder import RunFolder


def evaluate(options: argparse.Namespace) -> int:
    """Measure every finished stage of a run, or the finished model on other images."""
    if options.config is not None:
        from .reference_evaluation import evaluate_reference

        evaluate_reference(options)
        return 0
    with _no_reference(options):
        if options.data is not None:
            _evaluate_on(options)
            return 0
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


def _evaluate_on(options: argparse.Namespace) -> None:
    """Compare the clusters of labelled images with their classes."""
    from .devices import choose_device
    from .evaluating import check_prototypes, show_evaluation
    from .predictor import Predictor

    check_prototypes(options.prototypes)
    predictor = Predictor.load(options.target, choose_device(options.device or "auto", "--device"))
    data_option.check_labelled(options.data)
    source = predictor.source(options.data, setting="--data")
    title = f"{options.target} on {options.data}"
    show_evaluation(predictor, source, title, as_json=options.json, prototypes=options.prototypes)


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


def probe(options: argparse.Namespace) -> int:
    """Measure linear classifiers that learn from few labels, on the frozen features of a run."""
    from dataclasses import asdict

    from .devices import choose_device
    from .probing import Images, parse_percents, predictors, probe, run_images, show
    from .runs.folder import RunFolder

    percents = parse_percents(options.labels)
    if options.draws < 1:
        raise UsageError(f"--draws must be at least 1, got {options.draws}")
    if options.data is None and options.test is not None:
        raise UsageError("--test goes with --data, the images that the classifiers learn from")
    if options.data is None and options.target.is_file():
        raise UsageError(f"{options.target} is a file: give --data with labelled images, and --test if they are apart")
    for option, given in (("--data", options.data), ("--test", options.test)):
        if given is not None:
            data_option.check_labelled(given, option)
    networks = predictors(options.target, choose_device(options.device, "--device"))
    final = list(networks.values())[-1]
    if options.data is None:
        images = run_images(RunFolder.existing(options.target), final.saved)
    else:
        test = None if options.test is None else final.source(options.test, setting="--test")
        images = Images.of(final.source(options.data, setting="--data"), test, (f"--data {options.data}", "--test"))

    def say(text: str) -> None:
        if not options.json:
            print(shown(text))

    if images.held_out:
        seen = ". The run has seen them, without their labels" if options.data is None else ""
        total = len(images.train) + len(images.test)
        say(f"{len(images.test)} of {total} images are held out, by a hash of the names{seen}")
    found = probe(networks, images, percents, draws=options.draws, seed=options.seed, say=say)
    if options.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, str(options.target))
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
        return 0

    def write() -> None:
        with atomic_file(options.out) as file:
            table.dump(file)

    distributed.on_first(write)
    return 0


def embed(options: argparse.Namespace) -> int:
    """Write the feature vectors of images."""
    import numpy as np

    from .atomic import atomic_file

    network, source = _network_and_source(options)
    features = network.features(source).numpy()

    def write() -> None:
        with atomic_file(options.out) as file:
            np.savez(file, features=features, paths=np.array(source.paths))

    distributed.on_first(write)
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
    show(file.describe(network.form), sys.stderr)
    return network


def _network_and_source(options: argparse.Namespace) -> tuple[Predictor | Embedder, Source]:
    from .devices import choose_device

    images = data_option.folder_or_files(options.data)
    network = _network(options, choose_device(options.device, "--device"))
    source = network.source(images, options.on_error, "--data")
    if source.skipped:
        path, reason = source.skipped[0]
        show(f"left out {len(source.skipped)} unreadable images, the first is {path}: {reason}", sys.stderr)
    return network, source


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
            written = export_reference(options.target, options.out, options.stage)
        if options.stage == "mining":  # their names are not the user's
            for path in written:
                show(str(path))
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
        RunError: if the run has no assignments yet, a file is damaged, or images have changed since.
        DataError: if the images are no longer there.
    """
    from .data.datasets import open_splits
    from .runs.artifacts import ASSIGNMENTS, CONFIG
    from .training.images import check_shown

    run.read(ASSIGNMENTS)
    config = run.read(CONFIG)
    # A run folder may come from elsewhere: what is only looked at asks no server for images.
    splits = open_splits(config.data.model_copy(update={"resident": "files", "download": False}), run.decode_cache())
    both = {"train": splits.train, "test": splits.test}
    sources = {split: source for split, source in both.items() if source is not None}
    check_shown(run, sources, config.data.identity)
    return config.name, sources


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
                print(f"{group}\t{shown(text)}")
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
        show(f"{count:>8}  {options.out / folder}")
    return 0
