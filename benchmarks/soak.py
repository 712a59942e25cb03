"""Watches a process that lives long: ``python -m benchmarks.soak --minutes 120 --json FILE``. Linux only.

One process does in small, over and over, what users do in long-lived ones (:mod:`benchmarks.soak_work`), with sizes
that vary. After each round it measures what it holds of the system (:mod:`benchmarks.resources`) and appends a line to
``FILE`` with the ending ``.jsonl``. At the end it judges the second part of the run:

- memory: the line through the bytes that belong to no file, once malloc has given free pages back, rises by less than a
  MiB in 100 rounds, at the upper end of the slope's 95 % confidence interval, and by less than 2 % in all;
- objects of Python: less than 50 per round, likewise (DALI keeps some ten for each new thread that uses it);
- open files, threads, child processes, temporary files: as many after each round as after the others.

The verdict is "flat", "grows" (the lower end of an interval is above the bound, or a count changes), or "unclear": the
rounds are too few to tell. The exit code is 0, 1 or 2. The log also has the bytes that malloc has given out, and the
resident memory before free pages went back.

PyTorch keeps what it has prepared for the last 1,024 shapes, up to some hundred megabytes. That takes hours to fill
here and would hide a leak. So the caches hold a few shapes each, unless the environment says otherwise or ``--caches``
is given. For the same reason all threads share one arena of malloc, unless MALLOC_ARENA_MAX is set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .environment import describe
from .files import write_json
from .resources import Sample, Trend, sample, trend, use_one_arena
from .soak_work import ACTIVITIES, LEFT_OUT, Activity, renderers

MIB = 1 << 20
SLOPE_BOUND = MIB / 100
"""Bytes per round."""
GROWTH_BOUND = 0.02
OBJECTS_BOUND = 50.0
"""Objects per round."""
CACHES = {"LRU_CACHE_CAPACITY": "16", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "16"}
"""Environment variables, and the capacity of PyTorch's cache and of oneDNN's. Both are read at the first operation."""
EXIT_CODES = {"flat": 0, "grows": 1, "unclear": 2}


def soak(
    activities: Mapping[str, Activity], *, seconds: float, rounds: int | None, seed: int, log: Path | None
) -> list[Sample]:
    """Do rounds of all activities and measure after each.

    Args:
        activities: what to do in each round.
        seconds: no round begins later than this.
        rounds: the largest number of rounds; None for no limit.
        seed: seed of the order of the activities and of all that they draw.
        log: a file that gets one line of JSON per round, or None.

    Returns:
        One measurement per round.
    """
    samples: list[Sample] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end and (rounds is None or len(samples) < rounds):
        draw = random.Random(f"{seed} {len(samples)}")
        names, times = list(activities), {}
        draw.shuffle(names)
        for name in names:
            begin = time.monotonic()
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            try:
                activities[name](folder, draw)
            except Exception as error:
                raise RuntimeError(f"{name} failed in round {len(samples) + 1}") from error
            finally:
                shutil.rmtree(folder)
            times[name] = round(time.monotonic() - begin, 3)
        samples.append(sample())
        if log is not None:
            line = {"round": len(samples), "time": round(time.time(), 1), **samples[-1].to_dict(), "seconds": times}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
    return samples


def judge(samples: Sequence[Sample], start: float = 0.5) -> dict[str, Any]:
    """Return a verdict over the rounds after a share of them, with its reasons, as plain values.

    Args:
        samples: one per round.
        start: the share of the rounds that fill caches and do not count.
    """
    late = samples[int(len(samples) * start) :]
    if len(late) < 3:
        return {"verdict": "unclear", "reasons": [f"{len(late)} rounds count, at least 3 are needed"]}
    grows: list[str] = []
    unclear: list[str] = []
    trends: dict[str, Trend] = {
        name: trend([getattr(each, name) for each in late])
        for name in ("resident", "proportional", "private", "anonymous", "trimmed", "allocated", "objects")
    }
    memory, objects = trends["trimmed"], trends["objects"]
    for what, line, bound, unit, scale in (
        ("memory", memory, SLOPE_BOUND, "MiB per 100 rounds", 100 / MIB),
        ("objects of Python", objects, OBJECTS_BOUND, "objects per round", 1.0),
    ):
        text = f"{what}: {line.slope * scale:.3g} {unit} ({line.low * scale:.3g} to {line.high * scale:.3g})"
        if line.low > bound:
            grows.append(text)
        elif line.high >= bound:
            unclear.append(text)
    if memory.growth >= GROWTH_BOUND:
        (grows if memory.low > 0 else unclear).append(f"memory: {memory.growth:.1%} in {memory.rounds} rounds")
    for name in ("files", "threads", "python_threads", "children", "temporary"):
        seen = [getattr(each, name) for each in late]
        if any(value != seen[0] for value in seen):
            different = [value for place, value in enumerate(seen) if value not in seen[:place]]
            grows.append(f"{name} changes: {', '.join(map(str, different[:5]))}")
    verdict = "grows" if grows else "unclear" if unclear else "flat"
    return {
        "verdict": verdict,
        "reasons": grows + unclear,
        "rounds": len(samples),
        "rounds_that_count": len(late),
        "trends": {name: line.__dict__ for name, line in trends.items()},
        "first": samples[0].to_dict(),
        "last": samples[-1].to_dict(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--rounds", type=int, help="end after so many rounds")
    parser.add_argument("--only", nargs="+", choices=tuple(ACTIVITIES), default=list(ACTIVITIES), metavar="ACTIVITY")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="the verdict; the log of the rounds goes beside it")
    parser.add_argument("--caches", action="store_true", help="leave PyTorch's caches of shapes as large as they are")
    parser.add_argument("--without-dali", action="store_true", help="render with the other renderers alone")
    options = parser.parse_args()
    LEFT_OUT.update(["dali"] if options.without_dali else [])
    if sys.platform != "linux":
        parser.error(f"memory is read from /proc, which {sys.platform} does not have")
    log = None if options.json is None else options.json.with_suffix(".jsonl")
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
    if not options.caches:
        for name, capacity in CACHES.items():
            os.environ.setdefault(name, capacity)
    one_arena = use_one_arena()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="scan-fast-soak-") as own:
        # Others use the system's temporary folder as well; what is left in this one is ours.
        os.environ["TMPDIR"] = tempfile.tempdir = own
        try:
            chosen = {name: ACTIVITIES[name] for name in options.only}
            samples = soak(chosen, seconds=60 * options.minutes, rounds=options.rounds, seed=options.seed, log=log)
            result = judge(samples) | {"seconds": round(time.monotonic() - begin, 1), "activities": options.only}
            result["caches"] = {name: os.environ.get(name) for name in CACHES}
            result["one_arena"] = one_arena
            result["renderers"] = list(renderers())
        finally:
            tempfile.tempdir = None
            del os.environ["TMPDIR"]
    print(f"{result['verdict']}: {len(samples)} rounds in {result['seconds']:.0f} s")
    for reason in result["reasons"]:
        print(f"  {reason}")
    if options.json is not None:
        write_json(options.json, {"environment": describe("cpu"), **result})
    return EXIT_CODES[result["verdict"]]


if __name__ == "__main__":
    sys.exit(main())
