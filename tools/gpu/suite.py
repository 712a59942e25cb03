"""Tests, checks and measures every CUDA kernel on a GPU in a few minutes; run it as ``tools/gpu_suite``.

It is made for a machine that is rented by the minute: it needs torch alone, and nvcc only if no module was carried.

    build     uses the carried module (``tools/gpu_build`` makes it), or builds one for this GPU alone
    smoke     every kernel set once, at sizes at which the rings of shared memory go round and blocks get several tiles
    accuracy  against float64, in poisoned memory; bit by bit if that is promised
    timings   against eager PyTorch and torch.compile, with the limit of the hardware
    repeat    the same call, the same bits
    graph     CUDA graphs, replayed on other inputs
    step      one SimCLR step: plain, captured, compiled; its profile
    memcheck  compute-sanitizer on our kernels; then, if time is left, initcheck, racecheck, peers and more sizes

Every stage runs in separate processes with limits. A kernel set that crashes or hangs is left out from then on, and the
others continue. FOLDER gets log.txt and summary.json, which is rewritten with every result, so that an interrupted run
leaves what it found. ``python -m tools.gpu.status --update SUMMARY ...`` adds summaries to docs/gpu-status.md.
Exit codes: 0 nothing failed, 1 something failed or was not finished, 2 cannot start, 130 and 143 interrupted.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

from benchmarks.files import write_json

from . import carried, conclusions, jobs
from .jobs import Job, Outcome
from .report import report
from .stages import NAMES, REFUSALS, STAGES, Stage, Where, kept_for_later

DEFAULT_BUDGET = 240.0
RESERVE = 3.0  # seconds kept for writing
LEAST = 5.0  # with fewer seconds nothing is started: loading PyTorch takes as long
SLOWER = 4.0  # a rehearsal may run on a slow machine; it shows that the stages work


class Suite:
    """State of a run of the suite: its folder, its summary and its end."""

    def __init__(self, out: Path, rehearse: bool, budget: float, log: TextIO) -> None:
        self.out, self.log = out, log
        self.device, self.pace = ("cpu", SLOWER) if rehearse else ("cuda", 1.0)
        self.folder: Path | None = None
        self.begin = time.monotonic()
        self.end = self.begin + budget
        self.lock = threading.RLock()
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
        """Return the remaining seconds."""
        return self.end - RESERVE - time.monotonic()

    def write(self, indent: int | None = None) -> None:
        """Write summary.json."""
        with self.lock:
            conclusions.conclude(self.summary)
            write_json(self.out / "summary.json", self.summary, indent)

    def take(self, line: dict[str, Any]) -> None:
        """Add a line of a stage to the summary."""
        with self.lock:
            if "timing" in line:
                self.summary["timings"].append(line)
            elif "way" in line or "profile" in line:
                self.summary["step"].append(line)
            elif "note" in line:
                self.note(f"{line['stage']}: {line['note']}")
            elif "ceilings" in line:
                self.summary["environment"]["ceilings"] = line["ceilings"]
            else:
                conclusions.note(self.summary["sets"], line)
                if line.get("passed") is False:
                    self.say(f"    FAILED {line['family']} {line['kernels']}, {line['case']}: {line['problem']}")
            self.write()

    def say(self, text: str) -> None:
        """Print a line and log it."""
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def note(self, text: str) -> None:
        """Print a line and keep it in the summary."""
        with self.lock:
            self.summary["notes"].append(text)
            self.say(f"    {text}")

    def ended(self, name: str, record: dict[str, Any], status: str, seconds: float = 0.0) -> None:
        """Record the end of a stage."""
        record |= {"status": status, "seconds": round(seconds, 1)}
        self.say(f"{status:<14} {seconds:7.1f} s  {name}")
        self.write()

    def alive(self, sets: Sequence[str]) -> tuple[str, ...]:
        """Return the sets that have neither crashed nor hung."""
        known = self.summary["sets"]
        return tuple(
            s
            for s in sets
            if not any(stage["lost"] for name, stage in known[s]["stages"].items() if name in conclusions.COUNTING)
        )


# ---- a stage -------------------------------------------------------------------------------------------------------


def run_stage(suite: Suite, stage: Stage, sets: Sequence[str], wanted: tuple[str, ...]) -> None:
    """Run one stage on the sets that have neither crashed nor hung, and record how it ended."""
    begin = time.monotonic()
    record: dict[str, Any] = {"status": "running", "seconds": 0.0, "jobs": []}
    suite.summary["stages"][stage.name] = record
    seconds = min(stage.seconds * suite.pace, suite.left() - kept_for_later(stage.name, wanted))
    if seconds < LEAST:
        return suite.ended(stage.name, record, "no time left")
    end = begin + seconds
    left_over: list[str] = []

    def make(names: tuple[str, ...]) -> list[Job]:
        return stage.jobs(where(), names)

    def where() -> Where:
        return Where(suite.device, end - time.monotonic(), suite.folder, suite.pace, wanted)

    def run(job: Job) -> list[str]:
        outcome = jobs.run(job, end - time.monotonic(), suite.log, suite.take)
        with suite.lock:
            rest = [] if job.prepares else _after(suite, stage.name, job, outcome)
            suite.write()
        return rest

    waiting = make(suite.alive(sets))
    if not waiting:
        none = "nothing to run" if suite.alive(sets) == () else "not here"
        return suite.ended(stage.name, record, none)
    beside = stage.beside(where(), suite.alive(sets))
    while waiting:
        with ThreadPoolExecutor(stage.at_a_time + len(beside)) as pool:
            left_over = [name for rest in pool.map(run, beside + waiting) for name in rest]
        beside = []
        waiting = make(tuple(left_over)) if left_over and end - time.monotonic() > LEAST else []
    if left_over:
        record["jobs"].append({"sets": left_over, "status": "cut off"})
    return suite.ended(stage.name, record, _status(suite, stage.name, record), time.monotonic() - begin)


def _after(suite: Suite, name: str, job: Job, outcome: Outcome) -> list[str]:
    """Record how a job ended; return the sets that it left undone after one that crashed or hung."""
    record, known = suite.summary["stages"][name], suite.summary["sets"]
    under_tool = bool(job.complaints)
    refusal = next((text for text in outcome.tail if any(words in text for words in REFUSALS)), "")
    silent = outcome.begun is None and not any(known[s]["stages"].get(name, {}).get("cases") for s in job.sets)
    if under_tool and (refusal or (silent and outcome.status.startswith(("failed", "hung")))):
        for kernel_set in job.sets:
            known[kernel_set]["stages"].pop(name, None)
        reason = refusal or (outcome.tail[-1] if outcome.tail else outcome.status)
        record["jobs"].append({"sets": list(job.sets), "status": "not here"})
        suite.note(f"{name}: compute-sanitizer does not work here: {reason}")
        return []
    record["jobs"].append({"sets": list(job.sets), "status": outcome.status})
    if under_tool and outcome.status == "failed (9)":
        _errors_of_tool(suite, name, job, outcome)
        return []
    if outcome.status == "passed":
        return []
    begun = outcome.begun or {}
    where = f"{begun['begin']}" if begun else "no case"
    last = outcome.tail[-1] if outcome.tail else ""
    lost = [s for s in begun.get("sets", [f"{begun.get('family')}:{begun.get('kernels')}"]) if s in known]
    who = ", ".join(s.replace(":", " ") for s in lost) or "none of our kernels"
    suite.note(f"{name}: {outcome.status} in {who}, {where}" + (f": {last}" if last else ""))
    for text in outcome.tail[:-1]:
        suite.say(f"        {text}")
    if outcome.status == "cut off":
        return []
    if not begun and len(job.sets) == 1:
        lost = list(job.sets)  # it did not reach its first case
    reason = f"{outcome.status} in {where}" + (f": {last}" if last else "")
    for kernel_set in lost:
        known[kernel_set]["stages"].setdefault(name, conclusions.empty())["lost"] = reason
    through = {s for s in job.sets if known[s]["stages"].get(name, {}).get("done")}
    # Without progress the next would end like this one.
    return [s for s in job.sets if s not in lost and s not in through] if lost else []


def _errors_of_tool(suite: Suite, name: str, job: Job, outcome: Outcome) -> None:
    """Attribute errors that compute-sanitizer only counted: to all sets, if there is no complaint."""
    known = suite.summary["sets"]
    blamed = [s for s in job.sets if known[s]["stages"].get(name, {}).get("complaints")]
    total = next((text for text in outcome.tail if "SUMMARY" in text), "errors were counted")
    suite.note(f"{name}: {total}; in {', '.join(blamed) or 'no case: counted against all'}")
    for kernel_set in job.sets if not blamed else ():
        known[kernel_set]["stages"].setdefault(name, conclusions.empty())["complaints"].append(total)


def _status(suite: Suite, name: str, record: dict[str, Any]) -> str:
    ends = [job["status"] for job in record["jobs"]]
    if ends and all(end == "not here" for end in ends):
        return "not here"
    wrong = any(conclusions.failures(name, s["stages"].get(name, conclusions.empty())) for s in _sets(suite))
    if wrong or any(end.startswith(("failed", "hung")) for end in ends):
        return "failed"
    return "cut off" if "cut off" in ends else "passed"


def _sets(suite: Suite) -> list[dict[str, Any]]:
    return list(suite.summary["sets"].values())


# ---- the module ----------------------------------------------------------------------------------------------------


def provide_module(suite: Suite, build: bool) -> str:
    """Use the carried module, the one that is there, or build one; return in one line why there is none."""
    begin = time.monotonic()
    record: dict[str, Any] = {"status": "running", "seconds": 0.0, "jobs": []}
    suite.summary["stages"]["build"] = record
    refusal = carried.use(suite.folder) if suite.folder is not None else ""
    if refusal:
        suite.note(refusal)
    problem, build_helps = inspect_machine(suite)
    if problem and build_helps and build:
        suite.note(f"{problem}; building")
        major, _, minor = suite.summary["environment"]["capability"].partition(".")
        environment = {
            "SCAN_FAST_WAIT_LIMIT": "1",
            "SCAN_FAST_CUDA": "on",
            "SCAN_FAST_CUDA_ARCHS": f"{major}{minor}{'a' if (major, minor) == ('9', '0') else ''}",
        }
        job = Job((sys.executable, "setup.py", "build_ext", "--inplace"), (), environment, patience=150.0)
        outcome = jobs.run(job, min(150.0, suite.left()), suite.log, suite.take)
        if outcome.status == "passed":
            problem, _ = inspect_machine(suite)
        else:
            wrong = next((text for text in outcome.tail if "error" in text.lower()), " ".join(outcome.tail[-1:]))
            problem = f"the build {outcome.status}: {wrong}"
    suite.ended("build", record, "failed" if problem else "passed", time.monotonic() - begin)
    return problem


def inspect_machine(suite: Suite) -> tuple[str, bool]:
    """Record the machine; return in one line why the suite cannot run on it, and whether building may help."""
    found: dict[str, Any] = {}
    command = (sys.executable, "-m", "tools.gpu.about", "--device", suite.device)
    outcome = jobs.run(Job(command), min(60.0 * suite.pace, suite.left()), suite.log, found.update)
    if "environment" not in found:
        return f"the package cannot be imported ({outcome.status}): {' '.join(outcome.tail[-1:])}", False
    about = {key: found[key] for key in ("capability", "multiprocessors") if key in found}
    suite.summary["environment"] = found["environment"] | about
    if found["problem"]:
        return str(found["problem"]), bool(found["build_helps"])
    built, tree = found["sources"], {known["source"]: known["sha256"] for known in _sets(suite)}
    differ = sorted(name for name, digest in tree.items() if name in built and built[name] != digest)
    if suite.device == "cuda" and not built:
        return "the compiled module does not say which sources it was built from; build it again", True
    if suite.device == "cuda" and differ:
        return f"the compiled module is of other sources than this tree: {', '.join(differ)}; build it again", True
    if suite.device == "cuda" and not found["wait_limit"]:
        suite.note("the module's kernels wait without a limit (SCAN_FAST_WAIT_LIMIT=1 when it is built gives them one)")
    return "", False


# ---- command line --------------------------------------------------------------------------------------------------


def chosen(text: str) -> tuple[list[str], list[str]]:
    """Split ``--only`` into stages and kernel sets.

    Names of stages restrict the stages, names of families or kernel sets restrict the kernel sets.
    """
    sets = conclusions.kernel_sets()
    families = {name.partition(":")[0] for name in sets}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in {*NAMES, *families, *sets}]
    if unknown:
        known = ", ".join((*NAMES, *sorted(families), *sets))
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is neither a stage nor a family; there are {known}")
    wanted = [s for s in sets if s in names or s.partition(":")[0] in names]
    return [name for name in names if name in NAMES] or list(NAMES), wanted or list(sets)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT") or "gpu_suite_out"))
    parser.add_argument("--rehearse", action="store_true", help="the same stages on the CPU, with tiny sizes")
    parser.add_argument(
        "--budget", type=float, default=DEFAULT_BUDGET, metavar="SECONDS", help="time limit (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        type=chosen,
        default=(list(NAMES), list(conclusions.kernel_sets())),
        metavar="NAMES",
        help="stages, families or kernel sets, separated by commas, e.g. accuracy,nt_xent:sm90",
    )
    parser.add_argument("--carried", type=Path, metavar="FOLDER", help="with the module that gpu_build made")
    parser.add_argument("--no-build", action="store_true", help="never build: use the compiled module that is there")
    parser.add_argument(
        "--merge", nargs="+", type=Path, metavar="SUMMARY", help="write one summary of several into FOLDER, and stop"
    )
    options = parser.parse_args(arguments)
    if not options.budget > 0:
        parser.error(f"--budget must be positive, got {options.budget:g}")
    out = options.folder.resolve()
    try:
        # Before anything is written: one of them may be in FOLDER.
        read = [json.loads(path.read_text()) for path in options.merge or ()]
        merged = conclusions.merge(read) if read else None
        out.mkdir(parents=True, exist_ok=True)
        if merged is not None:
            write_json(out / "summary.json", merged, 1)
            print("\n".join(report(merged)))
            return 0
        log = (out / "log.txt").open("w")
    except (OSError, ValueError, KeyError, TypeError) as error:
        what = "the summaries cannot be merged" if options.merge else f"{out} cannot be written"
        parser.error(f"{what}: {type(error).__name__}: {error}")
    with log:
        suite = Suite(out, options.rehearse, options.budget * (SLOWER if options.rehearse else 1), log)
        suite.folder = options.carried
        stages, sets = options.only
        return _guarded(suite, stages, sets, not (options.no_build or options.rehearse))


def _guarded(suite: Suite, stages: list[str], sets: list[str], build: bool) -> int:
    """Run; whatever happens, write the summary and end all processes."""

    def interrupted(number: int, frame: object) -> None:
        jobs.stop()
        suite.note(f"interrupted by {signal.Signals(number).name}")
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    try:
        return _run(suite, tuple(stages), sets, build)
    finally:
        jobs.stop()
        suite.write(1)


def _run(suite: Suite, stages: tuple[str, ...], sets: list[str], build: bool) -> int:
    suite.write()
    problem = provide_module(suite, build)
    if problem:
        suite.note(problem)
        return 2
    if suite.summary["environment"].get("capability", "9.0") != "9.0":
        suite.note(f"no kernels for sm_90a on compute capability {suite.summary['environment']['capability']}")
        sets = [name for name in sets if not name.endswith(":sm90")]
    for stage in STAGES:
        if stage.name in stages:
            run_stage(suite, stage, sets, stages)
    suite.summary["finished"] = True
    suite.write()
    for line in report(suite.summary):
        suite.say(line)
    suite.say(f"{time.monotonic() - suite.begin:.0f} s; {suite.out}")
    known = suite.summary["kernels"]
    wrong = any(known[suite.summary["sets"][name]["source"]]["status"] == conclusions.FAILED for name in sets)
    open_ = any(suite.summary["stages"].get(s, {}).get("status") in UNFINISHED for s in conclusions.GATING)
    return 1 if wrong or open_ else 0


UNFINISHED = ("failed", "cut off", "no time left", "nothing to run")


if __name__ == "__main__":
    raise SystemExit(main())
