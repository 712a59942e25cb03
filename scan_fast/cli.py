"""The command line: ``scan-fast run configs/cifar10.yaml``, ``scan-fast run --data my_photos --clusters 12``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__

_OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")

IMAGES = "a folder of images, or PREFIX:ARGUMENT as in data.source, such as webdataset:SHARDS"

EXIT_USAGE = 2
"""The exit code of every error that the user can mend."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"scan-fast: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = _Parser(
        prog="scan-fast", description="Group images without labels: SimCLR, neighbour mining, SCAN, self-labelling."
    )
    parser.add_argument("--version", action="version", version=f"scan-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.add_argument("--traceback", action="store_true", help="show where an error came from")
        sub.set_defaults(run=run)
        return sub

    stages = {
        "run": ((), "all stages: images in, clusters, a predictor and a report out; an unfinished run continues"),
        "pretext": (("pretext",), "stage one: learn a representation without labels (SimCLR)"),
        "mine": (("mining",), "find the nearest neighbours of every image"),
        "cluster": (("clustering",), "stage two: train the cluster heads (SCAN loss)"),
        "selflabel": (("selflabel",), "stage three: learn from confident images"),
    }
    for name, (names, text) in stages.items():
        sub = command(name, _train, f"{text}; section.key=value words change the configuration")
        sub.set_defaults(stages=names)
        sub.add_argument(
            "target",
            nargs="?",
            help="a configuration (YAML file or the name of a shipped one) or an existing run folder",
        )
        sub.set_defaults(overrides=[])
        sub.add_argument("--data", metavar="IMAGES", help=f"{IMAGES}, instead of a configuration")
        sub.add_argument("--clusters", type=int, metavar="K", help="the number of groups (clustering.n_clusters)")
        sub.add_argument("--out", type=Path, metavar="DIR", help="the run folder (default: runs/NAME)")
        sub.add_argument("--again", action="store_true", help="repeat: forget this stage and those after it first")
        sub.add_argument("--quiet", action="store_true", help="print errors only")

    sub = command("evaluate", _evaluate, "measure every finished stage of a run, and k-means for comparison")
    sub.add_argument("target", type=Path, help="a run folder")
    sub.add_argument("--json", action="store_true", help="print the numbers as JSON")

    sub = command("predict", _predict, "assign new images to the clusters of a run (CSV)")
    sub.add_argument("target", type=Path, help="a finished run folder or its model.pt")
    sub.add_argument("--data", required=True, metavar="IMAGES", help=IMAGES)
    sub.add_argument("--out", type=Path, metavar="FILE", help="the CSV file (default: standard output)")
    sub.add_argument("--device", default="auto")

    sub = command("embed", _embed, "write the feature vectors of images (.npz with features and paths)")
    sub.add_argument("target", type=Path, help="a finished run folder or its model.pt")
    sub.add_argument("--data", required=True, metavar="IMAGES", help=IMAGES)
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the .npz file")
    sub.add_argument("--device", default="auto")

    sub = command("export", _export, "write a model that runs without this package")
    sub.add_argument("target", type=Path, help="a finished run folder or its model.pt")
    sub.add_argument("--format", choices=("pt2", "onnx"), default="pt2", help="torch.export or ONNX (default: pt2)")
    sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to write")

    sub = command("report", _report, "write report.html of a finished run again")
    sub.add_argument("target", type=Path, help="a run folder")

    sub = command("sweep", _sweep, "the same run with several seeds: mean and standard deviation")
    sub.add_argument("target", help="a configuration")
    sub.set_defaults(overrides=[])
    sub.add_argument("--seeds", default="0-2", help="such as 0-9 or 0,3,7 (default: %(default)s)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="holds one run folder per seed (default: runs/NAME-sweep)")
    sub.add_argument("--quiet", action="store_true", help="print the final table only")

    sub = command("bench", _bench, "measure kernels, views or whole runs against their peers (benchmarks.NAME)")
    sub.add_argument("name", help="a module of benchmarks/, such as nt_xent, neighbors, views, end_to_end or targets")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="its own arguments, such as --device cpu --json FILE")

    sub = command("info", _info, "what was built, and what each operation runs on")
    sub.add_argument("--json", action="store_true", help="print as JSON")
    sub.add_argument(
        "--check",
        action="store_true",
        help="test all kernels on the GPU now; exit code 1 if one is wrong, 2 without GPU",
    )
    sub.add_argument("--device", help="with --check: cuda (the default), cuda:N, or cpu for the CPU kernels")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can mend are one line on standard error, and exit code 2."""
    rest, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = build_parser()
    options = parser.parse_args(rest)
    if overrides and "overrides" not in options:
        parser.error(f"{options.command} takes no configuration values, got {overrides[0]}")
    options.overrides = overrides
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        again = " without --again" if getattr(options, "again", False) else ""
        print(f"scan-fast: interrupted; the same command{again} continues", file=sys.stderr)
        return 130
    except Exception as error:
        message = _explain(error)
        if message is None or options.traceback:
            raise
        print(f"scan-fast: {message}", file=sys.stderr)
        return EXIT_USAGE


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take the ``section.key=value`` words out of a command line: they may stand anywhere among the options."""
    rest: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        value_of_option = bool(rest) and rest[-1] in (
            "--data",
            "--out",
            "--clusters",
            "--seeds",
            "--device",
            "--format",
        )
        is_override = _OVERRIDE.match(word) is not None and not value_of_option
        (overrides if is_override else rest).append(word)
    return rest, overrides


def _explain(error: Exception) -> str | None:
    """Return one line for an error that the user can mend, None for a defect of the program."""
    import errno

    from .runs.folder import RunError

    if isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        if error.errno == errno.ENOSPC:
            return f"{place}the disk is full; free some space, and the same command continues"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return f"{place}not writable or not readable ({error.strerror}); choose another folder with --out"
        return f"{place}{error.strerror or error}"
    if isinstance(error, (ValueError, RunError, ImportError)):
        return " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return f"out of GPU memory ({str(error).splitlines()[0]}); lower the batch_size of this stage"
    return None


def _train(options: argparse.Namespace) -> int:
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import forget, print_summary, run_stages, stages_of
    from .training.context import open_context

    config, folder = _configuration(options)
    if options.again and (folder / "config.yaml").is_file():
        # Repeating is the one way to change a configuration: only what is done again may differ.
        run = RunFolder.existing(folder)
        _check_again(run.config(), config, options.stages)
    else:
        run = RunFolder.open(folder, config)
    with run:
        tracker = Tracker(run, quiet=options.quiet, tensorboard=config.runtime.tensorboard)
        context = open_context(config, run, tracker)
        names = list(options.stages) or stages_of(context)
        if names[0] not in stages_of(context):
            raise ValueError(f"this configuration has no {names[0]} stage (selflabel: null)")
        if options.again:
            forget(context, names[0])
            run.write_text("config.yaml", config.to_yaml())
        tracker.say(
            f"{config.name}: {len(context.splits.train)} training and {len(context.splits.test)} test images, "
            f"{context.n_clusters} clusters, {context.model_config.backbone} on {context.device}, {run.path}"
        )
        run_stages(context, names)
        print_summary(context, tracker)
    return 0


def _configuration(options: argparse.Namespace) -> tuple[Any, Path]:
    """Return the configuration and the run folder that the command line asks for."""
    from .data.datasets import settings_for
    from .runs.config import ConfigError, build_config, find_config, load_config, merge, nested, parse_override
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
    if path.is_dir():
        run = RunFolder.existing(path)
        values: dict[str, Any] = run.config().model_dump(mode="json")
        for key, value in [*changes.items(), *map(parse_override, options.overrides)]:
            values = merge(values, nested(key, value))
        return build_config(values), options.out or path
    config = load_config(find_config(target), options.overrides, changes)
    return config, options.out or Path("runs") / _run_name(config)


def _run_name(config: Any) -> str:
    parts = [config.name, config.preset, f"seed{config.seed}"]
    if config.clustering.n_clusters is not None:
        parts.insert(1, str(config.clustering.n_clusters))
    return "-".join(part.replace("/", "_") for part in parts if part)


def _check_again(old: Any, new: Any, stages: Sequence[str]) -> None:
    from .runs.config import differences
    from .runs.folder import RunError
    from .stages.pipeline import STAGES

    order = list(STAGES)
    again = order[order.index(stages[0]) :] if stages else order
    kept = [d for d in differences(old, new) if d.partition(".")[0] not in (*again, "evaluation")]
    if stages and kept:
        raise RunError(f"--again repeats {', '.join(again)}, which {'; '.join(kept)} does not belong to")


def _evaluate(options: argparse.Namespace) -> int:
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import evaluate, print_summary
    from .training.context import open_context

    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run, quiet=options.json)
        context = open_context(run.config(), run, tracker)
        results = evaluate(context)
        if options.json:
            print(json.dumps(results, indent=2))
        else:
            print_summary(context, tracker)
    return 0


def _predict(options: argparse.Namespace) -> int:
    import csv

    from .predictor import Predictor
    from .stages.results import PREDICTION_COLUMNS, prediction_rows
    from .training.context import choose_device

    predictor = Predictor.load(options.target, choose_device(options.device))
    source = predictor.source(options.data)
    probabilities = predictor.probabilities(source)
    handle = options.out.expanduser().open("w", newline="", encoding="utf-8") if options.out else sys.stdout
    try:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(PREDICTION_COLUMNS)
        writer.writerows(prediction_rows(source.paths, probabilities))
    finally:
        if options.out:
            handle.close()
    return 0


def _embed(options: argparse.Namespace) -> int:
    import numpy as np

    from .predictor import Predictor
    from .training.context import choose_device

    predictor = Predictor.load(options.target, choose_device(options.device))
    source = predictor.source(options.data)
    with options.out.expanduser().open("wb") as file:
        np.savez(file, features=predictor.features(source).numpy(), paths=np.array(source.paths))
    return 0


def _export(options: argparse.Namespace) -> int:
    from .export import export
    from .predictor import Predictor

    export(Predictor.load(options.target), options.out.expanduser(), options.format)
    return 0


def _report(options: argparse.Namespace) -> int:
    from .runs.folder import RunFolder
    from .runs.tracker import Tracker
    from .stages.pipeline import make_report
    from .training.context import open_context

    run = RunFolder.existing(options.target)
    with run:
        tracker = Tracker(run)
        make_report(open_context(run.config(), run, tracker))
        tracker.say(str(run.path / "report.html"))
    return 0


def _sweep(options: argparse.Namespace) -> int:
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
        raise ValueError(f"--seeds must look like 0-9 or 0,3,7, got {text!r}") from None
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds must name at least one seed, each once, got {text!r}")
    return seeds


def _bench(options: argparse.Namespace) -> int:
    import os
    import subprocess

    source = Path(__file__).resolve().parents[1]
    files = sorted((source / "benchmarks").glob("*.py"))
    names = [file.stem for file in files if 'if __name__ == "__main__":' in file.read_text()]
    if not names:
        raise ValueError(
            "the benchmarks are part of the source repository, not of the installed package: clone it, "
            "`pip install --no-build-isolation -e .` there, and give the same command again"
        )
    if options.name not in names:
        raise ValueError(f"bench must be one of {', '.join(names)}, got {options.name!r}")
    path = os.pathsep.join(filter(None, (str(source), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"benchmarks.{options.name}", *options.arguments]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _info(options: argparse.Namespace) -> int:
    if options.device is not None and not options.check:
        raise ValueError("--device goes with --check")
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


if __name__ == "__main__":
    sys.exit(main())
