"""The command line of the trials."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from scan_fast.data.datasets import Splits
from scan_fast.errors import ScanFastError, UsageError
from scan_fast.runs.config import Config, find_config
from scan_fast.runs.folder import RunFolder

from .. import trials
from ..environment import describe
from ..files import write_json
from ..gpu_run.archive import open_archive
from ..gpu_run.watch import EXIT_TIME, Stopped, Watch
from . import figures, tables
from .plan import (
    STAGES_OF_TRIALS,
    check_images,
    check_words,
    configuration,
    hidden,
    read_plan,
    read_result,
    resolve,
    result_of,
    stages_until,
)
from .running import position, run_trial, run_untrained, untrained_key

WORK = Path(__file__).resolve().parents[2] / "build" / "trials"
"""The folder of the work folders of plans."""
EXIT_USAGE = 2
ALONE = ("config", "until", "seeds", "device")
"""Options that a plan has in its file."""


def main(arguments: Sequence[str] | None = None, begin: float = trials.BEGIN) -> int:
    """Run; each expected problem is one line and exit code 2.

    Args:
        arguments: of the command line; those of the process by default.
        begin: when the minutes began, by :func:`time.monotonic`.

    Returns:
        The exit code: 0 if all is done or the time is up, 130 or 143 if interrupted.
    """
    options = parse(arguments)
    watch = Watch(options.minutes, begin)
    try:
        with watch.listening():
            if options.compare:
                return compare(options)
            return run_plan(options, watch) if options.plan else run_words(options, watch)
    except Stopped as stopped:
        print(f"trials: {stopped.status}; nothing was begun", flush=True)
        return _code(stopped)
    except (ScanFastError, OSError) as error:
        print(f"trials: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        return EXIT_USAGE


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trials",
        description=trials.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--plan", type=Path, help="a YAML file with the trials and what they share")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop with a checkpoint after so many")
    parser.add_argument(
        "--compare", type=Path, nargs=2, metavar=("SMALL", "LARGE"), help="the order of the trials of two result files"
    )
    parser.add_argument("--metric", choices=list(figures.METRICS), help="with --compare (default: the last one)")
    parser.add_argument("--config", help="a configuration file, or the name of a shipped one (default: digits)")
    parser.add_argument("--set", nargs="*", default=[], metavar="section.key=value", help="for all trials")
    parser.add_argument("--until", choices=STAGES_OF_TRIALS, help="the last stage to run (default: mining)")
    parser.add_argument("--seeds", type=int, nargs="+", help="(default: 0 1 2)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(default: cpu)")
    parser.add_argument("--work", type=Path, help="keep the stages' folders here; with a plan, build/trials/NAME")
    parser.add_argument("--archive", type=Path, help="take the images from this archive (see benchmarks.gpu_run)")
    parser.add_argument("--json", type=Path, help="also write the result to this file, and continue what it holds")
    parser.add_argument("trials", nargs="*", metavar="NAME: section.key=value ...")
    options = parser.parse_args(arguments)
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    given = [f"--{name}" for name in ALONE if getattr(options, name) is not None]
    if sum(map(bool, (options.plan, options.compare, options.trials))) != 1:
        parser.error("give one of --plan FILE, --compare SMALL LARGE, or trials such as 'short: pretext.epochs=9'")
    if (options.plan or options.compare) and given:
        parser.error(f"{given[0]} is for trials on the command line; a plan has it in its file")
    if options.metric and not options.compare:
        parser.error("--metric is for --compare")
    return options


@dataclass(frozen=True)
class Job:
    """One trial with one seed."""

    seed: int
    name: str
    words: tuple[str, ...]


@dataclass
class Work:
    """The work of a command: its jobs differ in seed and settings, and share the rest.

    Attributes:
        path: the configuration file.
        device: of the jobs.
        stages: to run.
        folder: holds the folders of the stages.
        watch: stops the work when it is time.
        result: gets the figures.
        files: get the result.
        compare_untrained: also measure the untrained networks.
        splits: the images; by default those that the configurations name.
    """

    path: Path
    device: str
    stages: list[str]
    folder: Path
    watch: Watch
    result: dict[str, Any]
    files: list[Path]
    compare_untrained: bool
    splits: Splits | None = None

    def save(self) -> None:
        """Write the result."""
        for file in self.files:
            write_json(file, self.result)

    def config(self, job: Job) -> Config:
        """Return the configuration of a job."""
        return configuration(self.path, job.words, job.seed, self.device)

    def lacks(self, job: Job) -> bool:
        """Return whether a job has no result yet."""
        return not set(self.stages) <= set(self.result["trials"][job.name]["seeds"].get(str(job.seed), {}))

    def do(self, jobs: Sequence[Job]) -> None:
        """Do the jobs one after another, and write the result after each.

        Raises:
            Stopped: if it is time.
        """
        for job in filter(self.lacks, jobs):
            self.watch.check()
            config = self.config(job)
            trial = self.result["trials"][job.name]
            key = untrained_key(config, self.stages) if self.compare_untrained else None
            if key is not None:
                starts = self.result["untrained"].setdefault(key, {})
                if str(job.seed) not in starts:
                    starts[str(job.seed)] = run_untrained(config, self.stages, self.folder, self.watch, self.splits)
                trial["untrained"] = key
            trial["seeds"][str(job.seed)] = run_trial(config, self.stages, self.folder, self.watch, self.splits)
            environment = describe(self.device)
            self.result["environment"] = environment
            if self.compare_untrained and environment not in self.result["environments"]:
                self.result["environments"].append(environment)
            print(f"seed {job.seed}, {job.name}: {json.dumps(trial['seeds'][str(job.seed)])}", flush=True)
            self.save()


def run_plan(options: argparse.Namespace, watch: Watch) -> int:
    """Run what a plan lacks."""
    path: Path = options.plan
    plan = read_plan(path)
    words: list[str] = options.set
    check_words(words)
    configs = resolve(plan, path, words)
    folder: Path = options.work or WORK / path.stem
    own = folder / "trials.json"
    files = [own] if options.json is None else [own, options.json]
    jobs = [Job(seed, trial.name, (*plan.set, *trial.changes, *words)) for seed in plan.seeds for trial in plan.trials]
    work = Work(find_config(plan.config), plan.device, plan.stages, folder, watch, {}, [], True)
    work.result = result_of(plan, path, files)
    if any(map(work.lacks, jobs)):
        work.splits = given_images(options, folder)
        check_images(configs, path, work.splits)
    with RunFolder(folder):  # one process at a time
        work.result = result_of(plan, path, files)
        work.files = files
        work.save()
        try:
            work.do(jobs)
        except Stopped as stopped:
            print(f"trials: {stopped.status}; {_left(work, jobs)}", flush=True)
            print(f"the same command goes on; it keeps the stages in {folder}", flush=True)
            return _code(stopped)
    print("\n" + tables.plan(work.result))
    print(f"all of {path} is done: {files[-1]}")
    return 0


def given_images(options: argparse.Namespace, folder: Path) -> Splits | None:
    """Return the images of ``--archive``, decoded into ``folder``; None if there is none."""
    if options.archive is None:
        return None
    return open_archive(options.archive, folder, say=partial(print, flush=True))


def _left(work: Work, jobs: Sequence[Job]) -> str:
    """Return in words what is done, how far the next trial is, and what is left."""
    left = [job for job in jobs if work.lacks(job)]
    text = f"{len(jobs) - len(left)} of {len(jobs)} runs are done"
    if not left:
        return text
    first = left[0]
    text += f"; left: {', '.join(f'{job.name} (seed {job.seed})' for job in left)}"
    return f"{text}; of {first.name} (seed {first.seed}), {position(work.config(first), work.stages, work.folder)}"


def run_words(options: argparse.Namespace, watch: Watch) -> int:
    """Run trials that the command line spells out."""
    config, until = options.config or "digits", options.until or "mining"
    seeds, device = options.seeds or [0, 1, 2], options.device or "cpu"
    path, stages = find_config(config), stages_until(until)
    common = hidden(options.set)
    result: dict[str, Any] = {"benchmark": "trials", "config": config, "set": common, "trials": {}}
    if options.json and options.json.exists():
        result = read_result(options.json)
        if result["config"] != config or result["set"] != common:
            raise UsageError(f"{options.json} holds trials of {result['config']} with {' '.join(result['set'])!r}")
    result |= {"device": device, "environment": describe(device)}
    parsed = dict(map(parse_trial, options.trials))
    if len(parsed) < len(options.trials):
        raise UsageError(f"two trials have one name; the names are {', '.join(parsed)}")
    for name, changes in parsed.items():
        known = result["trials"].setdefault(name, {"changes": hidden(changes), "seeds": {}})
        if known["changes"] != hidden(changes):
            raise UsageError(f"{options.json} has another trial named {name!r}: {' '.join(known['changes'])}")
        configuration(path, [*options.set, *changes], seeds[0], device)
    jobs = [Job(seed, name, (*options.set, *changes)) for seed in seeds for name, changes in parsed.items()]
    files = [options.json] if options.json else []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        images = given_images(options, folder)
        work = Work(path, device, stages, folder, watch, result, files, False, images)
        try:
            work.do(jobs)
        except Stopped as stopped:
            print(f"trials: {stopped.status}; {_left(work, jobs)}", flush=True)
            again = "goes on" if options.work and options.json else "begins again without --work and --json"
            print(f"the same command {again}", flush=True)
            return _code(stopped)
    print("\n" + tables.table(result))
    return 0


def parse_trial(text: str) -> tuple[str, list[str]]:
    """Split ``NAME: a.b=c d.e=f`` into the name and the changes."""
    name, _, changes = text.partition(":")
    return name.strip(), changes.split()


def compare(options: argparse.Namespace) -> int:
    """Print the order of the trials of two results."""
    small, large = map(read_result, options.compare)
    found = figures.compare(small, large, options.metric)
    print(tables.comparison(found, *titles(small, large)), end="")
    return 0


def titles(small: Mapping[str, Any], large: Mapping[str, Any]) -> tuple[str, str]:
    """Return a short name for each of two results: the settings that the other one does not have."""
    words = [list(result["set"]) for result in (small, large)]
    first, second = (
        " ".join(word for word in words[side] if word not in words[1 - side]) or name
        for side, name in ((0, "small"), (1, "large"))
    )
    return f"`{first}`" if "=" in first else first, f"`{second}`" if "=" in second else second


def _code(stopped: Stopped) -> int:
    # Time that is up is what --minutes asks for.
    return 0 if stopped.code == EXIT_TIME else stopped.code
