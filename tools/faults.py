"""Kill commands at random moments, or let each of their calls fail once, and compare with undisturbed ones.

    python -m tools.faults --kills 1000 --json FILE
    python -m tools.faults --all --json FILE [--every N]

``--kills`` repeats tiny runs and other commands of several kinds. Each process is killed at a random moment or at a
random call that changes files, and started again until it ends by itself. ``--all`` lists the calls of one tiny run
that change files, and has each of them fail in every way of :mod:`faults`, each time in another process; ``--every N``
takes every N-th of them. Then the same command must end in the same bits as one that was left alone, with the same
files and no others. The exit code is 1 if one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import faults
from driving import TINY, TINY_FOLDER, Process, fill, run_here

from benchmarks.environment import describe
from benchmarks.files import write_json

EVERY_STEP = "runtime.checkpoint_seconds=0"
SHORT = (
    *(*TINY, EVERY_STEP, "data.limit=96"),
    *("pretext.epochs=1", "clustering.epochs=1", "selflabel.epochs=1", "evaluation.thumbnails=8"),
)
"""All stages on the digits, as few steps as there can be, and a report with thumbnails."""
WAIT = 900.0


@dataclass(frozen=True)
class Scenario:
    """Commands that are killed.

    Attributes:
        name: for tables.
        words: the command that is started again and again, given the folder that it writes.
        first: the command until it has been killed once; None for the same.
        prepare: fills the folder.
        state: reads what must be equal.
    """

    name: str
    words: Callable[[Path], list[object]]
    first: Callable[[Path], list[object]] | None = None
    prepare: Callable[[Path], None] | None = None
    state: Callable[[Path], dict[str, Any]] = faults.state


def files_of(folder: Path) -> dict[str, Any]:
    """Return the contents of output files: those of an archive without its times.

    Temporary files do not count here. A later command cannot know that no other process writes them, so they stay.
    """
    found: dict[str, Any] = {}
    for path in sorted(set(folder.iterdir()) - set(folder.glob(".*.tmp"))):
        if path.suffix == ".npz":
            with np.load(path) as file:
                found |= {f"{path.name} {key}": file[key].tolist() for key in file.files}
        elif zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None, path
                found[path.name] = sorted(archive.namelist())
        else:
            found[path.name] = path.read_text()
    return found


def scenarios(work: Path) -> list[Scenario]:
    """Return the commands, with the images and the finished run that they need in a folder."""
    images = work / "images"
    fill(images, 36)
    finished = work / "finished"
    result = run_here("run", "digits", *SHORT, "--quiet", "--out", finished)
    assert result.code == 0, result.err
    small = ["--quiet", *TINY_FOLDER, EVERY_STEP, "data.test_fraction=0.2"]
    frozen = ["--quiet", "preset=descriptor", "data.image_size=32", "runtime.threads=1"]

    def digits(*more: str) -> Callable[[Path], list[object]]:
        return lambda folder: ["run", "digits", *SHORT, *more, "--quiet", "--out", folder]

    def given(*more: str, clusters: object = 3, settings: Sequence[str] = small) -> Callable[[Path], list[object]]:
        return lambda folder: ["run", "--data", images, "--clusters", clusters, "--out", folder, *settings, *more]

    def copied(folder: Path) -> None:
        shutil.copytree(finished, folder)

    def empty(folder: Path) -> None:
        folder.mkdir()

    def output(name: str, *words: object) -> Scenario:
        return Scenario(name, lambda folder: [*words, "--out", folder / name], prepare=empty, state=files_of)

    return [
        Scenario("digits", digits()),
        Scenario("digits in bfloat16", digits("precision=bfloat16")),
        Scenario("folder, files decoded at each use", given("data.resident=files")),
        Scenario("folder, kept in memory", given("data.resident=host")),
        Scenario("frozen features", given(settings=[*frozen, EVERY_STEP])),
        Scenario("frozen features, open number", given(settings=[*frozen, EVERY_STEP], clusters="auto")),
        Scenario(
            "run --again",
            lambda folder: ["run", folder, "--quiet"],
            first=lambda folder: ["run", folder, "--again", "--quiet"],
            prepare=copied,
        ),
        Scenario("report", lambda folder: ["report", folder], prepare=copied),
        output("clusters.csv", "predict", finished, "--data", images),
        output("features.npz", "embed", finished, "--data", images),
        output("model.pt2", "export", finished),
    ]


def strike(words: list[object], folder: Path, work: Path, draw: random.Random, seconds: float, calls: int) -> int:
    """Start a command and kill it at a random moment, or at a random call; return its exit code."""
    log = work / "log"
    if draw.random() < 0.5:
        way = draw.choice(("kill before", "kill after", "short write"))
        call = "write" if way == "short write" else "any"
        fault = faults.Fault(str(folder), str(work / "calls"), call, draw.randint(1, max(1, calls // 2)), way)
        (work / "calls").unlink(missing_ok=True)
        result = Process(*words, log=log, death=fault).result(WAIT)
    else:
        process = Process(*words, log=log)
        process.process.join(draw.uniform(0, 0.7 * seconds))
        process.signal(signal.SIGKILL)
        result = process.result(WAIT)
    assert result.code in (0, -signal.SIGKILL), (result.code, result.err)
    return result.code


def kill(wanted: int, seed: int, work: Path, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Kill processes until so many have died; return counts and what went wrong."""
    draw = random.Random(seed)
    known = []
    for scenario in scenarios(work):
        folder = work / "whole"
        if scenario.prepare is not None:
            scenario.prepare(folder)
        begin, calls = time.monotonic(), work / "calls"
        calls.unlink(missing_ok=True)
        words = (scenario.first or scenario.words)(folder)
        result = Process(*words, log=work / "log", death=faults.Fault(str(folder), str(calls))).result(WAIT)
        assert result.code == 0, (scenario.name, result.err)
        known.append((scenario, scenario.state(folder), time.monotonic() - begin, sum(faults.points(calls).values())))
        shutil.rmtree(folder)
    kills, ends = Counter[str](), Counter[str]()
    wrong: list[dict[str, Any]] = []
    beside = 0

    def content() -> dict[str, Any]:
        counts = {"kills": kills.total(), "by_scenario": dict(kills), "ends_compared": dict(ends)}
        return {**counts, "temporary_files_beside_outputs": beside, "wrong": wrong}

    while kills.total() < wanted:
        scenario, expected, seconds, calls_made = known[ends.total() % len(known)]
        folder = work / "run"
        if scenario.prepare is not None:
            scenario.prepare(folder)
        words, died = (scenario.first or scenario.words)(folder), 0
        try:
            while strike(words, folder, work, draw, seconds, calls_made):
                died += 1
                words = scenario.words(folder)
            if died and scenario.first is not None:
                result = Process(*scenario.words(folder), log=work / "log").result(WAIT)
                assert result.code == 0, result.err
            found, left = scenario.state(folder), faults.leftovers(folder)
            if scenario.state is files_of:
                beside, left = beside + len(left), []
            different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
            if different or left:
                wrong.append({"scenario": scenario.name, "kills": died, "different": different, "leftovers": left})
        except Exception as error:
            wrong.append({"scenario": scenario.name, "kills": died, "error": f"{type(error).__name__}: {error}"})
        kills[scenario.name] += died
        ends[scenario.name] += 1
        shutil.rmtree(folder, ignore_errors=True)
        report(content())
    return content()


def enumerate_all(every: int, first: int, work: Path, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Let every call fail in every way; return counts and what went wrong."""
    folder, log, calls = work / "run", work / "log", work / "calls"
    words = ["run", "digits", *SHORT, "--quiet", "--out", folder]
    assert Process(*words, log=log, death=faults.Fault(str(folder), str(calls))).result(WAIT).code == 0
    counted, expected = faults.points(calls), faults.state(folder)
    listed = faults.faults(counted, folder, work / "noted")
    chosen = listed[first::every]
    content: dict[str, Any] = {"calls": counted, "faults": len(listed), "chosen": len(chosen)}
    ends: dict[str, Counter[str]] = {}
    wrong: list[dict[str, Any]] = []
    for number, fault in enumerate(chosen, 1):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            end = faults.survive(words, fault, expected, log)
        except AssertionError as error:
            end = "wrong"
            wrong.append({"call": fault.call, "at": fault.at, "way": fault.way, "error": str(error)[:3000]})
        ends.setdefault(f"{fault.call}, {fault.way}", Counter())[end] += 1
        content |= {"tried": number, "ends": {name: dict(count) for name, count in ends.items()}, "wrong": wrong}
        report(content)
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--kills", type=int, metavar="N", help="kill N processes")
    what.add_argument("--all", action="store_true", help="let every call fail in every way")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="with --all: every N-th fault alone")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="with --every: begin with this fault, from 0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the result, written anew after each command")
    options = parser.parse_args()
    environment, begin = describe("cpu"), time.monotonic()

    def report(content: dict[str, Any]) -> None:
        if options.json is not None:
            seconds = round(time.monotonic() - begin)
            write_json(options.json, {"environment": environment, "seconds": seconds, **content})

    with tempfile.TemporaryDirectory(prefix="scan-fast-faults-") as name:
        work = Path(name)
        os.chdir(work)
        if options.all:
            result = enumerate_all(options.every, options.first, work, report)
        else:
            result = kill(options.kills, options.seed, work, report)
    report(result)
    print(json.dumps({key: value for key, value in result.items() if key != "wrong"}, indent=2))
    for each in result["wrong"]:
        print(json.dumps(each), file=sys.stderr)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
