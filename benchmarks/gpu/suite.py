"""Everything that a GPU has to say about the kernels, in a few minutes; run it as ``benchmarks/gpu_suite``.

For a machine that is rented by the minute: it needs torch alone, and nvcc only if no module was carried along.

    build     takes the carried module (``benchmarks/gpu_build`` makes it), or builds one for this GPU alone
    smoke     every kernel set once, at sizes at which the rings of shared memory go round and blocks get several tiles
    accuracy  against float64, in poisoned memory; bit by bit where that is promised
    timings   against eager PyTorch and torch.compile, with the limit of the hardware
    repeat    the same call, the same bits
    graph     CUDA graphs, replayed on other inputs
    step      one SimCLR step: plain, captured, compiled; its profile
    memcheck  compute-sanitizer on our kernels; then, if time is left, initcheck, racecheck, peers and more sizes

Every stage runs in processes of their own with limits. A kernel set that crashes or hangs is left out from then on, and
the others go on. FOLDER gets log.txt and summary.json, which is written anew as results come in: a run that is cut off
leaves what it found. ``python -m benchmarks.gpu_status --update SUMMARY ...`` takes summaries into docs/gpu-status.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from . import carried, conclusions, jobs
from .jobs import Job, Outcome

PYTHON = sys.executable
DEFAULT_BUDGET = 240.0
RESERVE = 3.0  # seconds kept for writing


@dataclass(frozen=True)
class Stage:
    """A stage: its limit, how many of its processes run at a time, and what to run for some kernel sets."""

    name: str
    seconds: float
    at_a_time: int
    jobs: Callable[[Suite, tuple[str, ...], float], list[Job]]


class Suite:
    """A run of the suite: where it writes, what it knows, when it ends."""

    def __init__(self, out: Path, rehearse: bool, budget: float, log: TextIO) -> None:
        self.out, self.rehearse, self.log = out, rehearse, log
        self.device = "cpu" if rehearse else "cuda"
        self.begin = time.monotonic()
        self.end = self.begin + budget
        self.lock = threading.Lock()
        self.written = 0.0
        hashes = conclusions.source_hashes()
        self.summary: dict[str, Any] = {
            "rehearsal": rehearse,
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "environment": {},
            "finished": False,
            "stages": {},
            "sets": {
                name: {"source": source, "sha256": hashes[source], "stages": {}}
                for name, source in conclusions.kernel_sets().items()
            },
            "kernels": {},
            "timings": [],
            "step": [],
            "notes": [],
        }

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.end - RESERVE - time.monotonic()

    def write(self, least_seconds: float = 0.0) -> None:
        """Write the summary in one step, unless that was done less than ``least_seconds`` ago."""
        if time.monotonic() - self.written < least_seconds:
            return
        conclusions.conclude(self.summary)
        temporary = self.out / ".summary.json"
        temporary.write_text(json.dumps(self.summary, indent=1) + "\n")
        os.replace(temporary, self.out / "summary.json")
        self.written = time.monotonic()

    def take(self, line: dict[str, Any]) -> None:
        """Take a stage's line into the summary."""
        with self.lock:
            if "timing" in line:
                self.summary["timings"].append(line)
            elif "way" in line or "profile" in line:
                self.summary["step"].append(line)
            elif "ceilings" in line:
                self.summary["environment"]["ceilings"] = line["ceilings"]
            else:
                conclusions.note(self.summary["sets"], line)
                if line.get("passed") is False:
                    self.say(f"    FAILED {line['family']} {line['kernels']}, {line['case']}: {line['problem']}")
            self.write(0.2)

    def say(self, text: str) -> None:
        """Print a line, into the log as well."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def note(self, text: str) -> None:
        """Keep a line in the summary, and print it."""
        self.summary["notes"].append(text)
        self.say(f"    {text}")

    def alive(self, sets: Sequence[str]) -> tuple[str, ...]:
        """Return the sets that have neither crashed nor hung."""
        known = self.summary["sets"]
        return tuple(s for s in sets if not any(stage["lost"] for stage in known[s]["stages"].values()))


# ---- stages --------------------------------------------------------------------------------------------------------


def _python(suite: Suite, module: str, *words: str) -> tuple[str, ...]:
    return (PYTHON, "-m", f"benchmarks.gpu.{module}", *words, "--device", suite.device)


def _checks(check: str, size: str, stage: str = "", patience: float = 60.0) -> Callable[..., list[Job]]:
    def of(suite: Suite, sets: tuple[str, ...], seconds: float) -> list[Job]:
        words = (check, "--stage", stage or check, "--size", "tiny" if suite.rehearse else size, "--sets")
        # On a processor the kernels run one after the other: processes would only load torch again and again.
        groups = [sets] if suite.rehearse else [(s,) for s in sets]
        return [Job(_python(suite, "checks", *words, *group), group, patience=patience) for group in groups if group]

    return of


def _timings(stage: str, *options: str) -> Callable[..., list[Job]]:
    def of(suite: Suite, sets: tuple[str, ...], seconds: float) -> list[Job]:
        words = ["--stage", stage, *options, "--seconds", f"{0.8 * seconds:.0f}"]
        words += ["--quick"] if suite.rehearse else []
        command = _python(suite, "timings", *words, "--sets", *sets)
        return [Job(command, sets, patience=90.0)] if sets else []

    return of


def _step(suite: Suite, sets: tuple[str, ...], seconds: float) -> list[Job]:
    kernels = "sm90" if "nt_xent:sm90" in sets else "portable"
    words = ["--kernels", kernels, "--seconds", f"{0.7 * seconds:.0f}", *(["--quick"] if suite.rehearse else [])]
    return [Job(_python(suite, "step", *words), patience=120.0)]


def _sanitizer(tool: str) -> Callable[..., list[Job]]:
    def of(suite: Suite, sets: tuple[str, ...], seconds: float) -> list[Job]:
        command = _python(suite, "checks", "call", "--stage", tool, "--size", "tiny", "--sets", *sets)
        if suite.rehearse:
            return [Job(command, sets)] if tool == "memcheck" and sets else []
        sanitizer = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
        if sanitizer is None or not sets:
            return []
        # Ours alone: PyTorch's own kernels are not in question. Without its cache each tensor is an allocation of its
        # own, and the bounds of each are seen.
        prefix = [sanitizer, "--tool", tool, "--kernel-regex", "kns=scan_fast", "--error-exitcode", "9"]
        prefix += ["--target-processes", "all"]
        return [Job((*prefix, *command), sets, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, patience=60.0)]

    return of


STAGES = (
    Stage("smoke", 30, 4, _checks("accuracy", "smoke", "smoke", patience=25)),
    Stage("accuracy", 60, 4, _checks("accuracy", "full")),
    Stage("timings", 70, 1, _timings("timings")),
    Stage("repeat", 30, 4, _checks("repeat", "smoke")),
    Stage("graph", 30, 4, _checks("graph", "smoke")),
    Stage("step", 60, 1, _step),
    Stage("memcheck", 60, 1, _sanitizer("memcheck")),
    Stage("initcheck", 40, 1, _sanitizer("initcheck")),
    Stage("racecheck", 40, 1, _sanitizer("racecheck")),
    Stage("peers", 40, 1, _timings("peers", "--peers")),
    Stage("more", 60, 1, _timings("more", "--more")),
)
INFORMING = ("timings", "step", "initcheck", "racecheck", "peers", "more")
"""Stages whose own failure says nothing about a kernel."""


def run_stage(suite: Suite, stage: Stage, sets: Sequence[str]) -> None:
    """Run one stage on the sets that still run, and note how it went."""
    begin = time.monotonic()
    seconds = min(stage.seconds * (4 if suite.rehearse else 1), suite.left())
    record = {"status": "passed", "seconds": 0.0, "jobs": []}
    suite.summary["stages"][stage.name] = record
    if seconds < 5:
        record["status"] = "no time left"
        suite.say(f"{record['status']:<14} {0.0:7.1f} s  {stage.name}")
        return suite.write()
    waiting = stage.jobs(suite, suite.alive(sets), seconds)
    if not waiting:
        record["status"] = "not here" + ("" if suite.rehearse else ": compute-sanitizer is missing")
        suite.say(f"{record['status']:<14} {0.0:7.1f} s  {stage.name}")
        return suite.write()
    end = begin + seconds
    for kernel_set in {name for job in waiting for name in job.sets}:
        # What an earlier call said of this stage is replaced.
        suite.summary["sets"][kernel_set]["stages"].pop(stage.name, None)

    def run(job: Job) -> list[Job]:
        outcome = jobs.run(job, max(1.0, end - time.monotonic()), suite.log, suite.take)
        with suite.lock:
            return _after(suite, stage, job, outcome, end)

    while waiting:
        with ThreadPoolExecutor(stage.at_a_time) as pool:
            waiting = [again for found in pool.map(run, waiting) for again in found]
    record["seconds"] = round(time.monotonic() - begin, 1)
    record["status"] = _stage_status(suite, stage.name, record)
    suite.say(f"{record['status']:<14} {record['seconds']:7.1f} s  {stage.name}")
    return suite.write()


def _after(suite: Suite, stage: Stage, job: Job, outcome: Outcome, end: float) -> list[Job]:
    """Note how a job ended; return the jobs for those of its sets that it left undone after one that crashed."""
    record = suite.summary["stages"][stage.name]
    record["jobs"].append({"sets": list(job.sets), "status": outcome.status})
    if outcome.status == "passed":
        return []
    begun = outcome.begun or {}
    lost = f"{begun.get('family', '')}:{begun.get('kernels', '')}"
    where = f"{begun.get('family', '')} {begun.get('kernels', '')}, {begun['begin']}" if begun else "no case"
    last = outcome.tail[-1] if outcome.tail else ""
    suite.note(f"{stage.name}: {outcome.status} in {where}" + (f": {last}" if last else ""))
    for text in outcome.tail[:-1]:
        suite.say(f"        {text}")
    if outcome.status == "cut off":
        return []
    known = suite.summary["sets"]
    if lost not in known and len(job.sets) == 1:
        lost = job.sets[0]
    if lost not in known or (stage.name in INFORMING and not outcome.status.startswith("hung")):
        return []
    stages = known[lost]["stages"]
    entry = stages.setdefault(stage.name, conclusions.empty())
    if stage.name in ("memcheck", "initcheck", "racecheck"):
        errors = [text for text in outcome.tail if "ERROR SUMMARY" in text and " 0 errors" not in text]
        if not errors:
            return []  # the tool itself did not work: the set is not finished, and nobody has said that it is wrong
        entry["failed"].append(errors[-1].strip("= "))
        return []
    entry["lost"] = f"{outcome.status} in {begun.get('begin', 'no case')}" + (f": {last}" if last else "")
    rest = tuple(s for s in job.sets if s != lost and not known[s]["stages"].get(stage.name, {}).get("done"))
    return stage.jobs(suite, rest, end - time.monotonic()) if rest and end - time.monotonic() > 5 else []


def _stage_status(suite: Suite, name: str, record: dict[str, Any]) -> str:
    failed = any(s["stages"].get(name, {}).get("failed") for s in suite.summary["sets"].values())
    ends = [job["status"] for job in record["jobs"]]
    if failed or any(end.startswith(("failed", "hung")) for end in ends):
        return "failed"
    return "cut off" if "cut off" in ends else "passed"


# ---- the module ----------------------------------------------------------------------------------------------------


def provide_module(suite: Suite, folder: Path | None, build: bool) -> str:
    """Take the carried module or build one; return why there is none, in one line."""
    if folder is not None:
        reason = carried.use(folder)
        if not reason:
            return ""
        suite.note(reason)
    if not build:
        return ""
    environment = {"SCAN_FAST_WAIT_LIMIT": "1", "SCAN_FAST_CUDA": "off" if suite.rehearse else "on"}
    if not suite.rehearse:
        environment["SCAN_FAST_CUDA_ARCHS"] = _architecture()
    job = Job((PYTHON, "setup.py", "build_ext", "--inplace"), (), environment, patience=170.0)
    begin = time.monotonic()
    outcome = jobs.run(job, min(200.0, suite.left()), suite.log, suite.take)
    seconds = round(time.monotonic() - begin, 1)
    suite.summary["stages"]["build"] = {"status": outcome.status, "seconds": seconds, "jobs": []}
    suite.say(f"{outcome.status:<14} {seconds:7.1f} s  build")
    return "" if outcome.status == "passed" else f"the build {outcome.status}: {' | '.join(outcome.tail[-3:])}"


def _architecture() -> str:
    """Return this GPU's architecture as the build wants it, e.g. ``90a``."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --rehearse runs the same stages on the CPU")
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def look_around(suite: Suite) -> str:
    """Note what this machine is; return why the suite cannot run on it, in one line."""
    found: dict[str, Any] = {}
    outcome = jobs.run(Job(_python(suite, "about")), min(60.0, suite.left()), suite.log, found.update)
    if "environment" not in found:
        return f"the package cannot be imported: {' | '.join(outcome.tail[-2:])}"
    suite.summary["environment"] = found["environment"] | {k: found[k] for k in found if k in ("capability",)}
    built, tree = found["sources"], {s["source"]: s["sha256"] for s in suite.summary["sets"].values()}
    differ = sorted(name for name, digest in built.items() if tree.get(name) != digest)
    if not found["problem"] and differ:
        return f"the compiled module is of other sources than this tree: {', '.join(differ)}; build it again"
    return str(found["problem"])


# ---- command line --------------------------------------------------------------------------------------------------


def chosen(text: str) -> tuple[list[str], list[str]]:
    """Split ``--only``: names of stages, of families and of kernel sets; what is not named is not restricted."""
    stages = {stage.name for stage in STAGES}
    sets = conclusions.kernel_sets()
    families = {name.partition(":")[0] for name in sets}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in stages | families | set(sets)]
    if unknown:
        known = ", ".join((*(stage.name for stage in STAGES), *sorted(families), *sets))
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither a stage nor a family; there are {known}")
    wanted = [s for s in sets if s in names or s.partition(":")[0] in names]
    return [name for name in names if name in stages], wanted or list(sets)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT") or "gpu_suite_out"))
    parser.add_argument("--rehearse", action="store_true", help="the same stages on the CPU, with tiny sizes")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, metavar="SECONDS", help="for everything")
    parser.add_argument(
        "--only",
        type=chosen,
        default=([], list(conclusions.kernel_sets())),
        metavar="NAMES",
        help="stages, families or kernel sets, separated by commas, e.g. accuracy,nt_xent:sm90",
    )
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="with the module that gpu_build made")
    parser.add_argument("--no-build", action="store_true", help="take the compiled module that is there")
    parser.add_argument(
        "--merge",
        nargs="+",
        type=Path,
        metavar="SUMMARY",
        help="write one summary of several runs into FOLDER, and stop",
    )
    options = parser.parse_args(arguments)
    out = options.folder.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.merge:
        try:
            merged = conclusions.merge([json.loads(path.read_text()) for path in options.merge])
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"the summaries cannot be merged: {error}")
        (out / "summary.json").write_text(json.dumps(merged, indent=1) + "\n")
        print("\n".join(report(merged)))
        return 0
    with (out / "log.txt").open("w") as log:
        suite = Suite(out, options.rehearse, options.budget * (4 if options.rehearse else 1), log)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        try:
            stages, sets = options.only
            return _run(suite, stages, sets, options.carried, not options.no_build and not options.rehearse)
        except BaseException as error:
            if not isinstance(error, SystemExit):
                suite.summary["notes"].append(f"ended by {type(error).__name__}: {error}")
            raise
        finally:
            jobs.end_all()
            suite.write()


def _run(suite: Suite, stages: list[str], sets: list[str], folder: Path | None, build: bool) -> int:
    suite.write()
    problem = provide_module(suite, folder, build) or look_around(suite)
    if problem:
        suite.note(problem)
        return 2
    if suite.summary["environment"].get("capability", "9.0") != "9.0":
        suite.note(f"no kernels for sm_90a on compute capability {suite.summary['environment']['capability']}")
        sets = [name for name in sets if not name.endswith(":sm90")]
    for stage in STAGES:
        if not stages or stage.name in stages:
            run_stage(suite, stage, sets)
    suite.summary["finished"] = True
    suite.write()
    for line in report(suite.summary):
        suite.say(line)
    suite.say(f"{time.monotonic() - suite.begin:.0f} s; {suite.out}")
    states = {suite.summary["kernels"][suite.summary["sets"][name]["source"]]["status"] for name in sets}
    return 1 if conclusions.FAILED in states else 0


def report(summary: dict[str, Any]) -> list[str]:
    """Return the summary as lines for the terminal: times first, then what is verified."""
    lines = []
    for timing in summary["timings"]:
        eager = next((c["seconds"] for c in timing["contenders"] if c["name"] == "eager" and "seconds" in c), None)
        for c in timing["contenders"]:
            if "seconds" in c:
                faster = f"{eager / c['seconds']:7.2f} x eager" if eager else ""
                share = f"{c['of_limit']:5.0%} of the limit" if "of_limit" in c else ""
                lines.append(
                    f"{timing['family']:<11} {timing['timing']:<30} {c['name']:<28} {1e6 * c['seconds']:11.1f} us "
                    f"{faster:<15} {share}"
                )
    for way in (entry for entry in summary["step"] if "way" in entry):
        text = f"{1e3 * way['seconds']:.2f} ms" if "seconds" in way else way.get("failed") or way.get("skipped")
        lines.append(f"step        {way['way']:<30} {text}")
    for name, kernel in summary["kernels"].items():
        reason = f": {kernel['reason']}" if kernel["reason"] else ""
        lines.append(f"{kernel['status']:<11} {name} ({kernel['cases']} cases){reason}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
