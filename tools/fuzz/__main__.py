"""``python -m tools.fuzz``: runs targets, or repeats one input."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# One thread: processes are forked, and threads do not survive that. Read when NumPy and PyTorch are loaded.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

from benchmarks.environment import describe as machine

from .running import memory_folder, run_tasks, tasks_of
from .target import Target
from .targets import TARGETS
from .worker import Batch, describe


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 1 if there are findings."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"by default all: {', '.join(TARGETS)}")
    parser.add_argument("--inputs", type=int, default=20_000, help="of all targets together (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.add_argument("--index", type=int, help="feed this input alone to the target, and show it")
    parser.add_argument("--save", type=Path, metavar="FILE", help="with --index: write the input's bytes to a file")
    parser.add_argument("--processes", type=int, default=2, help="at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counts and the findings")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown or (options.index is not None and len(options.targets) != 1):
        parser.error(f"there is no target {unknown[0]}" if unknown else "--index goes with one target")
    torch.set_num_threads(1)
    names = list(dict.fromkeys(options.targets)) or list(TARGETS)
    with tempfile.TemporaryDirectory(prefix="fuzz-shared-", dir=memory_folder()) as shared:
        targets = [TARGETS[name](Path(shared)) for name in names]
        if options.index is not None:
            return _repeat(targets[0], options.seed, options.index, options.save)
        return _run(targets, options)


def _repeat(target: Target, seed: int, index: int, save: Path | None) -> int:
    given = target.make(seed, index)
    print(describe(given))
    if save is not None:
        save.write_bytes(given if isinstance(given, bytes) else repr(given).encode("utf-8", "surrogatepass"))
    batch = run_tasks(tasks_of(target, seed, 1, index))[target.name]
    for finding in batch.findings:
        print(f"{finding.kind}: {finding.what}\n  {finding.place}")
    if not batch.findings:
        print("accepted" if batch.accepted else f"refused: {', '.join(batch.errors)}")
    return bool(batch.findings)


def shares(targets: list[Target], inputs: int) -> dict[str, int]:
    """Return the inputs of each target: at least one, and together as many as wanted, up to rounding."""
    whole = sum(target.share for target in targets)
    return {target.name: max(1, round(inputs * target.share / whole)) for target in targets}


def _run(targets: list[Target], options: argparse.Namespace) -> int:
    counts = shares(targets, options.inputs)
    tasks = [task for target in targets for task in tasks_of(target, options.seed, counts[target.name])]
    tasks.sort(key=lambda task: task.first / counts[task.target.name])  # all targets from the start
    begin, done = time.monotonic(), 0

    def say(task: Any, batch: Batch) -> None:
        nonlocal done
        before, done = done, done + batch.inputs
        if done * 20 // options.inputs > before * 20 // options.inputs:
            print(f"{done:,} inputs, {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)

    results = run_tasks(tasks, options.processes, say)
    record = _record(results, options, time.monotonic() - begin)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    _show(record)
    return bool(record["findings"])


def _record(results: dict[str, Batch], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    groups: dict[Any, dict[str, Any]] = {}
    for batch in results.values():
        for finding in batch.findings:
            entry = {"target": finding.target, "kind": finding.kind, "what": finding.what, "place": finding.place}
            first = groups.setdefault(
                (finding.target, *finding.signature), {**entry, "count": 0, "command": finding.command}
            )
            first["count"] += 1
    rows = {
        name: {
            "inputs": batch.inputs,
            "refused": batch.refused,
            "accepted": batch.accepted,
            "findings": len(batch.findings),
            "seconds": round(batch.seconds, 1),
            "inputs_per_second": round(batch.inputs / batch.seconds, 1) if batch.seconds else None,
            "slowest_seconds": round(batch.slowest, 3),
            "slowest_index": batch.slowest_index,
            "errors": batch.errors,
        }
        for name, batch in results.items()
    }
    return {
        "command": f"python -m tools.fuzz {' '.join(options.targets)} --inputs {options.inputs} --seed {options.seed} "
        f"--processes {options.processes}",
        "environment": machine("cpu"),
        "seconds": round(seconds, 1),
        "inputs": sum(batch.inputs for batch in results.values()),
        "targets": rows,
        "findings": sorted(groups.values(), key=lambda entry: -entry["count"]),
    }


def _show(record: dict[str, Any]) -> None:
    names = ("inputs", "refused", "accepted", "findings", "seconds", "inputs_per_second", "slowest_seconds")
    sys.stderr.flush()
    print(f"{'target':<18}" + "".join(f"{name.replace('_per_second', '/s'):>16}" for name in names))
    for name, row in record["targets"].items():
        print(f"{name:<18}" + "".join(f"{row[key]!s:>16}" for key in names))
    print(f"{record['inputs']:,} inputs in {record['seconds']:,} s")
    for entry in record["findings"]:
        print(f"\n{entry['count']} x {entry['kind']}: {entry['what'][:300]}\n  {entry['place']}\n  {entry['command']}")


if __name__ == "__main__":
    sys.exit(main())
