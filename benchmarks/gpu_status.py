"""The record of what has passed on a GPU: ``python -m benchmarks.gpu_status --check | --refresh | --update SUMMARY``.

``--check`` fails where a kernel is called verified but its source is not the one that passed, or where
docs/gpu-status.md is not what the record says. ``--refresh`` after a change of a kernel writes down that it is now
unverified. ``--update SUMMARY ...`` takes over what one or several runs of ``benchmarks/gpu_suite`` on one model of GPU
found: a kernel is verified if its present source ran and passed everything that gates it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scan_fast import gpu_status

from .gpu.conclusions import NEVER, VERIFIED, merge

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PAGE = ROOT / "docs" / "gpu-status.md"
INTRODUCTION = """# What has run on a GPU

Every CUDA kernel is compiled for all supported architectures in the test suite and run on the host, thread by thread
(`csrc/common/device.h`). That does not replace a GPU. This page, written by `python -m benchmarks.gpu_status` from
`scan_fast/gpu_status.json`, says which kernels have passed `benchmarks/gpu_suite` on one, and in which form:

- **verified**: this very source (comments aside) passed;
- **failed**: this very source ran, and something was wrong: the last column says what;
- **partly run**: this very source ran without a failure, but not everything that it has to pass came to an end;
- **unverified**: an earlier form passed, the source has changed since;
- **never run**: compiled, and run on the host only. A kernel that is not listed has never run, either.

| kernel | status | on | date | commit | source hash | what failed, or is missing |
|---|---|---|---|---|---|---|
"""
ENDING = """
## To verify on a machine with an NVIDIA GPU

With nvcc, CMake, ninja and pybind11 beside torch, in one command:

    benchmarks/gpu_suite gpu_suite_out
    python -m benchmarks.gpu_status --update gpu_suite_out/summary.json

On a machine that is rented by the minute, with torch 2.11 for CUDA 13 and Python 3.12, bring the compiled module along;
PYTHON is an interpreter of that version with that torch, pybind11, ninja and CMake. Here:

    benchmarks/gpu_build --python PYTHON --peers --data cifar10-jpeg.tar.xz

There, with the working tree and `build/gpu_carry` (results go to `$OUT` if it is set):

    SCAN_FAST_COMMIT=COMMIT benchmarks/gpu_suite --carried build/gpu_carry --budget 270

After reading what failed, there again, and here:

    SCAN_FAST_COMMIT=COMMIT benchmarks/gpu_suite --carried build/gpu_carry --budget 120 --only accuracy,nt_xent:sm90
    python -m benchmarks.gpu_status --update first/summary.json second/summary.json

Of several summaries the later result of a case wins, as long as the kernel's source is the same (`benchmarks/gpu_suite
FOLDER --merge SUMMARY ...` writes such a union without touching the record).

The rest of the time may go to the `fast` CIFAR-10 preset ([recipes.md](recipes.md)):

    SCAN_FAST_COMMIT=COMMIT python -m benchmarks.gpu_run --minutes MINUTES

The suite needs torch alone. Its stages: every kernel once at sizes at which the rings of the `_sm90` kernels go round,
accuracy against float64 on fresh inputs in poisoned memory, times, repeatability, CUDA graphs, a SimCLR step with its
profile, and compute-sanitizer; then, if time is left, its other tools, other libraries and more sizes. Each runs in
processes with limits; a kernel that hangs or crashes is left out from then on. `summary.json` is rewritten with every
result, so a run that is cut off leaves what it found; the times and the step leave to what decides about a kernel the
seconds that it needs. Where compute-sanitizer does not work, a kernel is verified without it, and the summary says so.
`--rehearse` runs the same stages on the CPU. After a change of a verified kernel, `python -m benchmarks.gpu_status
--refresh` records that it is unverified; the tests fail until one of the two is done.

Sources that end in `_sm90` hold kernels for compute capability 9.0, beside the portable ones of their family. On a GPU
of a model on which a kernel's very source is verified it is taken as it is; on any other a self-test at its first use
decides between it and plain PyTorch, warns once where it fails, and keeps its verdict in `~/.cache/scan-fast`
(`scan-fast info --check` runs all of them again). On GPUs of compute capability 9.0 both sets of a family are judged:
the `_sm90` kernels run if both are right, the portable ones alone if only they are, and plain PyTorch otherwise.
`SCAN_FAST_GPU_KERNELS=sm90` takes the `_sm90` kernels without a test, `SCAN_FAST_GPU_KERNELS=portable` never does.
"""


def hashes() -> dict[str, str]:
    """Return the present source hash of every kernel."""
    return {name: gpu_status.source_hash(CSRC, path) for name, path in gpu_status.kernels_of(CSRC).items()}


def refreshed(records: dict[str, dict[str, Any]], present: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the records with present hashes.

    What passed in another form becomes unverified, a failure of another form is forgotten, new kernels never ran.
    """
    result = {}
    for name, digest in present.items():
        record = records.get(name, {})
        passed, latest = record.get("passed"), record.get("latest")
        if latest is not None and latest["sha256"] != digest:
            latest = None
        if latest is not None:
            status = latest["status"]
        elif passed is None:
            status = "never run"
        else:
            status = "verified" if passed["sha256"] == digest else "unverified"
        result[name] = {"status": status, "passed": passed, "latest": latest}
    return result


def updated(
    records: dict[str, dict[str, Any]], present: dict[str, str], summaries: Sequence[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the records with what runs of the suite add, in their order; runs of one model count together."""
    if any(summary["rehearsal"] for summary in summaries):
        raise SystemExit("this is the summary of a rehearsal: nothing ran on a GPU")
    try:
        summary = merge(list(summaries))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    environment = summary["environment"]
    records = dict(records)
    for name, kernel in summary["kernels"].items():
        if kernel["status"] == NEVER:
            continue
        about = {"sha256": kernel["sha256"], "date": summary["date"], "commit": environment.get("commit", "unknown")}
        about["device"] = environment["device"]
        before = records.get(name, {}).get("passed")
        if kernel["status"] == VERIFIED:
            records[name] = {"passed": about, "latest": None}
        else:
            latest = about | {"status": kernel["status"], "reason": kernel["reason"]}
            records[name] = {"passed": before, "latest": latest}
    return refreshed(records, present)


def problems(records: dict[str, dict[str, Any]], present: dict[str, str], page: str) -> list[str]:
    """Return what is wrong with the record or the page, each as a sentence."""
    found = [f"{name} has an entry but no source" for name in records if name not in present]
    for name, record in records.items():
        about = record.get("latest") or record["passed"]
        if name in present and record["status"] not in ("unverified", "never run") and about["sha256"] != present[name]:
            found.append(f"{name} is called {record['status']}, but its source is not the one that ran")
    if not found and page != render(records):
        found.append("docs/gpu-status.md does not show the record")
    return found


def render(records: dict[str, dict[str, Any]]) -> str:
    """Return docs/gpu-status.md."""
    rows = []
    for name, record in sorted(records.items()):
        about = record.get("latest") or record["passed"] or {}
        cells = [about.get("device", ""), about.get("date", ""), about.get("commit", "")[:12]]
        cells.append(f"`{about['sha256'][:12]}`" if about else "")
        cells.append(about.get("reason", "").replace("|", "/"))
        rows.append(f"| {name} | {record['status']} | {' | '.join(cells)} |\n")
    return INTRODUCTION + "".join(rows) + ENDING


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_status", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--refresh", action="store_true")
    action.add_argument("--update", type=Path, nargs="+", metavar="SUMMARY")
    options = parser.parse_args()
    present, records = hashes(), gpu_status.records()
    if options.check:
        found = problems(records, present, PAGE.read_text())
        print("\n".join(found) or "the record of what ran on a GPU is right")
        raise SystemExit(1 if found else 0)
    if options.update:
        records = updated(records, present, [json.loads(path.read_text()) for path in options.update])
    else:
        records = refreshed(records, present)
    gpu_status.RECORDS.write_text(json.dumps({"kernels": records}, indent=2) + "\n")
    PAGE.write_text(render(records))
    for name, record in records.items():
        print(gpu_status.summary(name, record))


if __name__ == "__main__":
    main()
