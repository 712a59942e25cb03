"""The ``fast`` CIFAR-10 preset on a GPU in the minutes that are left: ``python -m benchmarks.gpu_run --minutes 6``.

It decodes the archive of CIFAR-10 (JPEG) once, measures an epoch of each stage, plans as many epochs as fit the time,
and runs the stages of the package. The result folder gets gpu_run.json (after each stage) and gpu_run.log. The run
folder, with checkpoints of about 100 MB each, is a separate one: as long as it exists, the same command resumes the run
with the same plan. ``--device cpu --images 400 --width 0.25`` rehearses it. On a machine to which the compiled module
was carried, ``tools/gpu_run`` puts that in place first and takes the same options.

Exit codes: 0 finished, 1 failed, 2 cannot start, 3 time is up, 130 and 143 interrupted; all that was done is kept.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from scan_fast.data.datasets import Splits
from scan_fast.errors import RunError
from scan_fast.runs.artifacts import REPORT, checkpoint
from scan_fast.runs.config import Config, find_config, load_config, parse_override
from scan_fast.runs.folder import RunFolder
from scan_fast.stages.handover import Handover
from scan_fast.stages.pipeline import STAGES, finish, run_stage, stages_of
from scan_fast.training.context import open_context
from scan_fast.training.process import kept_memory

from .. import files
from ..accuracy import measured_epochs
from ..environment import describe
from . import BEGIN, archive, schedule
from .watch import Stopped, Watch, WatchedTracker

ROOT = Path(__file__).resolve().parents[2]
TITLE = "CIFAR-10 (JPEG)"
RESERVE = 0.08
"""Part of the minutes for which no epoch is planned: writing, and a machine that slows down."""
CHECKPOINT_SECONDS = 20.0
EXIT_FAILED, EXIT_USAGE = 1, 2
EXPECTED = (ValueError, OSError, ImportError, RunError)
"""Errors whose message is enough."""


def main(arguments: Sequence[str] | None = None, begin: float = BEGIN) -> int:
    """Run; each expected problem is one line and an exit code.

    Args:
        arguments: of the command line; those of the process by default.
        begin: when the minutes began, by :func:`time.monotonic`.
    """
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    watch = Watch(options.minutes, begin)
    with watch.listening(), (options.out / "gpu_run.log").open("a", encoding="utf-8") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        try:
            return run(options, watch, say)
        except Stopped as stopped:
            say(f"gpu_run: {stopped.status}; nothing was trained yet, give the same command again")
            return stopped.code
        except EXPECTED as error:
            say(f"gpu_run: {' '.join(str(error).split())}")
            return EXIT_USAGE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, required=True, help="from the start of this process to its end")
    parser.add_argument("--archive", type=Path, default=Path("cifar10-jpeg.tar.xz"), help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "gpu_run_out"), help="gets the results"
    )
    parser.add_argument(
        "--run-folder", type=Path, default=ROOT / "build" / "gpu_run", help="gets checkpoints; resumes what it holds"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, help="take at most so many training images, and so many test images")
    parser.add_argument("--width", type=float, default=1.0, help="of the network, for a rehearsal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="further configuration")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.images is not None and options.images < 1:
        parser.error(f"--images must be positive, got {options.images}")
    return options


def run(options: argparse.Namespace, watch: Watch, say: Callable[[str], None]) -> int:
    """Decode, plan and train; the result folder has what was found whenever this ends."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that torch can use; --device cpu rehearses the run on the CPU")
    if not options.archive.is_file():
        raise ValueError(f"there is no archive {options.archive}; name cifar10-jpeg.tar.xz with --archive")
    splits = archive.open_archive(options.archive, options.run_folder, options.images, say)
    plan = make_plan(options, splits, watch, say)
    config = configuration(options, plan["epochs"])
    folder = RunFolder.open(options.run_folder / "run", config)
    with folder:
        report = Report(options, plan, config, folder, watch)
        try:
            train(config, folder, splits, watch, report, say)
        except Stopped as stopped:
            report.write(stopped.status)
            say(
                f"gpu_run: {stopped.status}, {progress_of(folder, config)}; all of it is kept in {options.run_folder}, "
                "and the same command resumes it"
            )
            return stopped.code
        except RunError as error:
            report.write(f"failed: {error}")
            say(f"gpu_run: {error}")
            return EXIT_FAILED
        except BaseException as error:
            report.write(f"failed: {type(error).__name__}: {error}")
            raise
    say(f"gpu_run: finished in {watch.elapsed / 60:.1f} of {options.minutes:g} minutes; {options.out / 'gpu_run.json'}")
    return 0


def configuration(options: argparse.Namespace, epochs: dict[str, int] | None = None) -> Config:
    """Return the ``fast`` CIFAR-10 configuration with the given epochs of each stage; with its own if None."""
    changes: dict[str, Any] = {
        "preset": "fast",
        "seed": options.seed,
        "name": TITLE,
        "model.width": options.width,
        "runtime.device": options.device,
        "runtime.checkpoint_seconds": CHECKPOINT_SECONDS,
        # The end of every stage is measured in any case; k-means on pixels would take longer than an epoch.
        "pretext.monitor_every": 0,
        "evaluation.baselines": False,
    }
    if options.device == "cpu":
        # No trial of bfloat16: a rehearsal is short.
        changes["precision"] = "float32"
    path = find_config("cifar10")
    changes |= map(parse_override, options.overrides)
    if epochs is not None:
        changes |= schedule.scaled(load_config(path, (), changes), epochs)
    return load_config(path, (), changes)


def make_plan(options: argparse.Namespace, splits: Splits, watch: Watch, say: Callable[[str], None]) -> dict[str, Any]:
    """Return the epochs of each stage: those of a run that has begun, otherwise planned from a measurement.

    Raises:
        ValueError: too little time, or an archive other than that of the run.
    """
    file: Path = options.run_folder / "plan.json"
    checksum = archive.checksum(options.archive)
    begun = (options.run_folder / "run" / "metrics.jsonl").exists() or any(
        (options.run_folder / "run" / "checkpoints").glob("*.pt")
    )
    if begun and file.is_file():
        plan: dict[str, Any] = json.loads(file.read_text())
        if plan["archive"] != checksum:
            raise ValueError(f"{options.run_folder} holds a run on another archive; choose another --run-folder")
        say(f"plan: going on with {_spelled(plan['epochs'])}")
        return plan
    config = configuration(options)
    RunFolder.open(options.run_folder / "run", config)  # refuses a folder of something else before anything takes time
    full = schedule.learned_stages(config)
    begin = watch.elapsed
    speeds = schedule.measure(config, splits, options.run_folder / "measure", min(1.5, 0.01 * watch.seconds))
    measured = watch.elapsed - begin
    available = (1 - RESERVE) * watch.seconds - watch.elapsed
    try:
        epochs = schedule.plan_epochs(full, speeds, available)
    except schedule.TooShort as error:
        needed = (speeds.seconds(dict.fromkeys(full, 1)) + watch.elapsed) / (1 - RESERVE) / 60
        raise ValueError(
            f"--minutes {options.minutes:g} is too short: {error}; {needed:.1f} minutes are needed"
        ) from None
    costs = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in speeds.epochs.items())
    say(
        f"plan: {_spelled(epochs, full)}, about {speeds.seconds(epochs):.0f} s of {available:.0f} s; an epoch takes "
        f"{costs}, everything else {speeds.once:.0f} s (measured in {measured:.0f} s)"
    )
    plan = {"epochs": epochs, "full_epochs": full, "speeds": schedule.to_plain(speeds), "archive": checksum}
    files.write_json(file, plan)
    return plan


def _spelled(epochs: dict[str, int], full: dict[str, int] | None = None) -> str:
    return (
        ", ".join(f"{name} {count}" + (f"/{full[name]}" if full else "") for name, count in epochs.items()) + " epochs"
    )


def train(
    config: Config, run: RunFolder, splits: Splits, watch: Watch, report: Report, say: Callable[[str], None]
) -> None:
    """Run the stages that are not finished, then write the files that a run leaves."""
    tracker = WatchedTracker(run, watch, say)
    context = tracker.context = open_context(config, run, tracker, splits)
    report.write("running")
    handover = Handover()
    with kept_memory():
        for name in stages_of(context):
            if run.finished(name):
                continue
            watch.check()
            run_stage(context, STAGES[name], handover)
            report.write("running")
            say(f"{name}: done after {watch.elapsed:.0f} s  {headline(run.summary().stages[name])}")
    report.write("finished")
    if not run.has(REPORT):
        finish(context, handover)  # assignments.csv, model.pt, report.html: the result does not depend on them


def headline(entry: dict[str, Any]) -> str:
    """Return the metrics of a stage, in percent, as one line."""
    shown = {**entry, **entry.get("test", {})}
    names = {
        "knn_acc": "kNN",
        "purity": "purity",
        "test_purity": "test purity",
        "acc": "ACC",
        "nmi": "NMI",
        "ari": "ARI",
    }
    return "  ".join(f"{title} {100 * shown[key]:.2f}" for key, title in names.items() if key in shown)


def progress_of(run: RunFolder, config: Config) -> str:
    """Return how far a run has come, in words."""
    finished = list(run.summary().stages)
    text = f"finished are {', '.join(finished)}" if finished else "no stage is finished"
    for name, epochs in schedule.learned_stages(config).items():
        if name not in finished and run.has(checkpoint(name)):
            state = run.read(checkpoint(name))
            text += f", {name} is in epoch {min(state.epoch + 1, epochs)} of {epochs}"
    return text


class Report:
    """Writes gpu_run.json: what is known so far, after each stage."""

    def __init__(
        self, options: argparse.Namespace, plan: dict[str, Any], config: Config, run: RunFolder, watch: Watch
    ) -> None:
        self._file: Path = options.out / "gpu_run.json"
        self._run, self._watch = run, watch
        self._content = {
            "benchmark": "gpu_run",
            "title": f"{TITLE}, fast preset in {options.minutes:g} minutes",
            "dataset": TITLE,
            "device": options.device,
            "environment": describe(options.device),
            "minutes": options.minutes,
            "plan": plan,
            "config": config.model_dump(mode="json"),
        }

    def write(self, status: str) -> None:
        """Write the file."""
        stages = self._run.summary().stages
        entries = self._run.metrics()
        latest = {entry.stage: entry.to_dict() for entry in entries}
        content = self._content | {
            "status": status,
            "seconds": round(self._watch.elapsed, 1),
            "stages": stages,
            "epochs": {str(self._content["config"]["seed"]): measured_epochs(entries)},
            # Of a stage that has not finished, the last epoch that was recorded.
            "unfinished": {name: entry for name, entry in latest.items() if name not in stages},
        }
        files.write_json(self._file, content)
