"""The record of what has passed on a GPU: ``python -m benchmarks.gpu_status --check | --refresh | --update SUMMARY``.

``--check`` fails where a kernel is called verified but its source is not the one that passed, or where
docs/gpu-status.md is not what the record says. ``--refresh`` after a change of a kernel writes down that it is now
unverified. ``--update SUMMARY`` takes over what ``benchmarks/gpu_suite`` found: a kernel is verified if the suite ran
its present source and everything that gates it passed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from scan_fast import gpu_status

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
PAGE = ROOT / "docs" / "gpu-status.md"
INTRODUCTION = """# What has run on a GPU

Every CUDA kernel is compiled for all supported architectures in the test suite and run on the host, thread by thread
(`csrc/common/device.h`). That does not replace a GPU. This page, written by `python -m benchmarks.gpu_status` from
`scan_fast/gpu_status.json`, says which kernels have passed `benchmarks/gpu_suite` on one, and in which form:

- **verified**: this very source (comments aside) passed;
- **unverified**: an earlier form passed, the source has changed since;
- **never run**: compiled, and run on the host only. A kernel that is not listed has never run, either.

| kernel | status | passed on | date | commit | source hash |
|---|---|---|---|---|---|
"""
ENDING = """
To verify on a machine with an NVIDIA GPU and nvcc:

    benchmarks/gpu_suite gpu_suite_out
    python -m benchmarks.gpu_status --update gpu_suite_out/summary.json

The suite builds for that GPU, runs the CUDA tests, compares with float64 on fresh inputs and poisoned outputs, checks
that results repeat in every bit, runs compute-sanitizer, and measures. After a change of a verified kernel,
`python -m benchmarks.gpu_status --refresh` records that it is unverified; the tests fail until one of the two is done.
Sources that end in `_sm90` hold kernels for compute capability 9.0, beside the portable ones of their family. On such a
GPU they are taken once they are verified; until then, and for what they do not cover, the portable ones run.
`SCAN_FAST_GPU_KERNELS=sm90` takes them in any case, `SCAN_FAST_GPU_KERNELS=portable` never; the suite runs both.
Networks on a GPU take `batch_norm_cuda` once it is verified; until then they use PyTorch's batch normalisation.
"""


def hashes() -> dict[str, str]:
    """Return the present source hash of every kernel."""
    return {name: gpu_status.source_hash(CSRC, path) for name, path in gpu_status.kernels_of(CSRC).items()}


def refreshed(records: dict[str, dict[str, Any]], present: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the records with present hashes: what passed in another form becomes unverified, new kernels never ran."""
    result = {}
    for name, digest in present.items():
        passed = records.get(name, {}).get("passed")
        status = "never run" if passed is None else "verified" if passed["sha256"] == digest else "unverified"
        result[name] = {"status": status, "passed": passed}
    return result


def updated(
    records: dict[str, dict[str, Any]], present: dict[str, str], summary: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Return the records with what a run of the suite adds."""
    if summary["rehearsal"]:
        raise SystemExit("this is the summary of a rehearsal: nothing ran on a GPU")
    environment = summary["environment"]
    for name, kernel in summary["kernels"].items():
        if kernel["passed"]:
            passed = {"sha256": kernel["sha256"], "date": summary["date"]}
            passed |= {"commit": environment["commit"], "device": environment["device"]}
            records = records | {name: {"passed": passed}}
    return refreshed(records, present)


def problems(records: dict[str, dict[str, Any]], present: dict[str, str], page: str) -> list[str]:
    """Return what is wrong with the record or the page, each as a sentence."""
    found = [f"{name} has an entry but no source" for name in records if name not in present]
    for name, record in records.items():
        if name in present and record["status"] == "verified" and record["passed"]["sha256"] != present[name]:
            found.append(f"{name} is called verified, but its source is not the one that passed")
    if not found and page != render(records):
        found.append("docs/gpu-status.md does not show the record")
    return found


def render(records: dict[str, dict[str, Any]]) -> str:
    """Return docs/gpu-status.md."""
    rows = []
    for name, record in sorted(records.items()):
        passed = record["passed"] or {}
        cells = [passed.get("device", ""), passed.get("date", ""), passed.get("commit", "")[:12]]
        cells.append(f"`{passed['sha256'][:12]}`" if passed else "")
        rows.append(f"| {name} | {record['status']} | {' | '.join(cells)} |\n")
    return INTRODUCTION + "".join(rows) + ENDING


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_status", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--refresh", action="store_true")
    action.add_argument("--update", type=Path, metavar="SUMMARY")
    options = parser.parse_args()
    present, records = hashes(), gpu_status.records()
    if options.check:
        found = problems(records, present, PAGE.read_text())
        print("\n".join(found) or "the record of what ran on a GPU is right")
        raise SystemExit(1 if found else 0)
    if options.update:
        records = updated(records, present, json.loads(options.update.read_text()))
    else:
        records = refreshed(records, present)
    gpu_status.RECORDS.write_text(json.dumps({"kernels": records}, indent=2) + "\n")
    PAGE.write_text(render(records))
    for name, record in records.items():
        print(gpu_status.summary(name, record))


if __name__ == "__main__":
    main()
