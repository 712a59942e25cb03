"""The ``fast`` CIFAR-10 preset on a GPU in the minutes that are left: ``python -m benchmarks.gpu_run --minutes 6``.

It decodes the archive of CIFAR-10 (JPEG) once, measures what an epoch of each stage takes, plans as many epochs as end
in time, says so in one line and runs the package's own stages. The result folder gets gpu_run.json (after each stage)
and gpu_run.log. The run folder, with checkpoints of about 100 MB each, is another one: the same command goes on from
there, with the same plan, as long as that folder exists. ``--device cpu --images 400 --width 0.25`` rehearses it.

Exit codes: 0 finished, 1 failed, 2 cannot start, 3 time is up, 130 and 143 interrupted; what was done is kept.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Standard library only: the driver's own imports have to wait until what was carried along is in place.
from .gpu import carried
from .gpu.watch import Stopped, Watch

if TYPE_CHECKING:
    from scan_fast.data.datasets import Splits
    from scan_fast.runs.config import Config
    from scan_fast.runs.folder import RunFolder
    from scan_fast.training.context import Context

BEGIN = time.monotonic()
TITLE = "CIFAR-10 (JPEG)"
RESERVE = 0.08
"""The part of the minutes that no epoch is planned for: writing, and a machine that slows down."""
CHECKPOINT_SECONDS = 20.0
EXIT_FAILED, EXIT_USAGE = 1, 2


def main(arguments: Sequence[str] | None = None, begin: float = BEGIN) -> int:
    """Run, and turn each expected problem into one line and an exit code."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    watch = Watch(options.minutes, begin)
    with watch.listening(), (options.out / "gpu_run.log").open("a", encoding="utf-8") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        try:
            take_carried(options.carry, say)
            return run(options, watch, say)
        except Stopped as stopped:
            say(f"gpu_run: {stopped.status}; nothing was trained yet, the same command starts anew")
            return stopped.code
        except Exception as error:
            if not _expected(error):
                raise
            say(f"gpu_run: {' '.join(str(error).split())}")
            return EXIT_USAGE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, required=True, help="from the start of this process to its end")
    parser.add_argument("--archive", type=Path, default=carried.FOLDER / carried.ARCHIVE, help="cifar10-jpeg.tar.xz")
    parser.add_argument("--carry", type=Path, default=carried.FOLDER, help="the folder that gpu_build has filled")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or "gpu_run_out"), help="gets the results"
    )
    parser.add_argument("--run-folder", type=Path, default=carried.ROOT / "build" / "gpu_run", help="kept for going on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, help="take only so many of the training and of the test images")
    parser.add_argument("--width", type=float, default=1.0, help="of the network, for a rehearsal")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="further configuration")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.images is not None and options.images < 1:
        parser.error(f"--images must be positive, got {options.images}")
    return options


def take_carried(folder: Path, say: Callable[[str], None]) -> None:
    """Put the carried module and, where pydantic is missing, the carried wheels in place."""
    if importlib.util.find_spec("pydantic") is None:
        # Before all else: these versions were chosen together.
        sys.path.insert(0, str(carried.wheels(folder)))
        importlib.invalidate_caches()
    refusal = carried.use(folder)
    built = any((carried.ROOT / "scan_fast").glob(f"_C.{sys.implementation.cache_tag}*"))
    if refusal and not built:
        say(f"module: {refusal}; going on with plain PyTorch")


def _expected(error: Exception) -> bool:
    if isinstance(error, (ValueError, OSError, ImportError, carried.CarriedError)):
        return True
    # Where the driver cannot be imported, nothing raises its errors.
    driver = sys.modules.get("scan_fast.runs.folder")
    return driver is not None and isinstance(error, driver.RunError)


def run(options: argparse.Namespace, watch: Watch, say: Callable[[str], None]) -> int:
    """Decode, plan and train; the result folder has what was found whenever this ends."""
    import torch

    from scan_fast.errors import RunError
    from scan_fast.runs.folder import RunFolder

    # All that the run imports, before anything takes time.
    from .gpu import archive, schedule  # noqa: F401

    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no GPU that torch can use; --device cpu rehearses the run on the processor")
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
                "and the same command goes on from there"
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
    """Return the ``fast`` CIFAR-10 configuration, with so many epochs of each stage; its full ones for None."""
    from scan_fast.runs.config import find_config, load_config, parse_override

    from .gpu import schedule

    changes: dict[str, Any] = {
        "preset": "fast",
        "seed": options.seed,
        "name": TITLE,
        "model.width": options.width,
        "runtime.device": options.device,
        "runtime.checkpoint_seconds": CHECKPOINT_SECONDS,
        # Every stage's end is measured in any case; k-means on pixels would take longer than an epoch.
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
    """Return the epochs of each stage: those planned before where a run has begun, or new ones by measurement.

    Raises:
        ValueError: for too little time, or an archive that is not that of the run.
    """
    from scan_fast.runs.folder import RunFolder

    from .gpu import archive, schedule

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
    _write_json(file, plan)
    return plan


def _spelled(epochs: dict[str, int], full: dict[str, int] | None = None) -> str:
    return (
        ", ".join(f"{name} {count}" + (f"/{full[name]}" if full else "") for name, count in epochs.items()) + " epochs"
    )


def train(
    config: Config, run: RunFolder, splits: Splits, watch: Watch, report: Report, say: Callable[[str], None]
) -> None:
    """Do the stages that are not finished, and then what a run leaves behind."""
    from scan_fast.runs.artifacts import REPORT
    from scan_fast.stages.handover import Handover
    from scan_fast.stages.pipeline import STAGES, finish, run_stage, stages_of
    from scan_fast.training.context import open_context
    from scan_fast.training.process import kept_memory

    events = watched_events(run, watch, say)
    context = open_context(config, run, events, splits)
    events.context = context
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
        finish(context, handover)  # assignments.csv, model.pt, report.html: of no weight for the result


def headline(entry: dict[str, Any]) -> str:
    """Return a stage's measures, in percent, as one line."""
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
    """Return in words how far a run has come."""
    from scan_fast.runs.artifacts import checkpoint

    from .gpu import schedule

    finished = list(run.summary().stages)
    text = f"finished are {', '.join(finished)}" if finished else "no stage is finished"
    for name, epochs in schedule.learned_stages(config).items():
        if name not in finished and run.has(checkpoint(name)):
            state = run.read(checkpoint(name))
            text += f", {name} is in epoch {min(state.epoch + 1, epochs)} of {epochs}"
    return text


def watched_events(run: RunFolder, watch: Watch, say: Callable[[str], None]) -> Any:
    """Return the events of a run that are printed and logged, and stop it after a step where the watch says so."""
    from scan_fast.runs.tracker import Ticker, Tracker

    class WatchedTicker(Ticker):
        def step(self, images: int) -> None:
            super().step(images)
            watch.after_step(self._tracker.context)  # type: ignore[attr-defined]

    class WatchedEvents(Tracker):
        context: Context

        def say(self, text: str) -> None:
            say(text)

        @contextmanager
        def progress(self, stage: str, total_steps: int, done_steps: int) -> Iterator[Ticker]:
            watch.training = True
            try:
                yield WatchedTicker(self, stage, total_steps, done_steps)
            finally:
                watch.training = False

    return WatchedEvents(run, quiet=True)


class Report:
    """gpu_run.json: what is known so far, written anew after each stage."""

    def __init__(
        self, options: argparse.Namespace, plan: dict[str, Any], config: Config, run: RunFolder, watch: Watch
    ) -> None:
        from .environment import describe

        self._file: Path = options.out / "gpu_run.json"
        self._run, self._watch = run, watch
        environment = describe(options.device)
        environment["commit"] = os.environ.get("SCAN_FAST_COMMIT") or environment["commit"]
        self._content = {
            "benchmark": "gpu_run",
            "title": f"{TITLE}, fast preset in {options.minutes:g} minutes",
            "dataset": TITLE,
            "device": options.device,
            "environment": environment,
            "minutes": options.minutes,
            "plan": plan,
            "config": config.model_dump(mode="json"),
        }

    def write(self, status: str) -> None:
        """Write the file, beside its name and renamed."""
        stages = self._run.summary().stages
        latest = {entry.stage: entry.to_dict() for entry in self._run.metrics()}
        content = self._content | {
            "status": status,
            "seconds": round(self._watch.elapsed, 1),
            "stages": stages,
            # Of a stage that is under way, the last epoch that was recorded.
            "unfinished": {name: entry for name, entry in latest.items() if name not in stages},
        }
        _write_json(self._file, content)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, file)


if __name__ == "__main__":
    sys.exit(main())
