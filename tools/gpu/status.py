"""Keeps the record of what has passed on a GPU: ``python -m tools.gpu.status --check | --refresh | --update SUMMARY``.

``--check`` fails if a kernel is called verified but its source is not the one that passed, or if docs/gpu-status.md
does not show the record. ``--refresh`` records after a change of a kernel that it is now unverified. ``--update SUMMARY
...`` adds the results of one or several runs of ``tools/gpu_suite`` on one model of GPU: a kernel is verified if its
present source ran and passed everything that it must pass. ``--times SUMMARY --json FILE`` writes the times of a run as
a result file for docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import write_json
from scan_fast import gpu_status

from ..docs.gpu_status import PAGE, render
from .conclusions import NEVER, VERIFIED, merge

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"


def hashes() -> dict[str, str]:
    """Return the present source hash of every kernel."""
    return {name: gpu_status.source_hash(CSRC, path) for name, path in gpu_status.kernels_of(CSRC).items()}


def refreshed(records: dict[str, dict[str, Any]], present: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Return the records with present hashes.

    A kernel that passed in another form becomes unverified; a failure of another form is dropped; a new one never ran.
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
    """Return the records with the results of runs of the suite, in their order; runs on one model count together."""
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


def times(summary: dict[str, Any]) -> dict[str, Any]:
    """Return the times of a run of the suite in the form of a result file.

    Raises:
        SystemExit: if it was a rehearsal.
    """
    if summary["rehearsal"]:
        raise SystemExit("this is the summary of a rehearsal: its times say nothing")
    environment = dict(summary["environment"])
    return {
        "benchmark": "gpu_suite",
        "title": "CUDA kernels against PyTorch",
        "device": "cuda",
        "date": summary["date"],
        "ceilings": environment.pop("ceilings"),
        "environment": environment,
        "timings": summary["timings"],
        "step": summary["step"],
    }


def problems(records: dict[str, dict[str, Any]], present: dict[str, str], page: str) -> list[str]:
    """Return each error of the record or the page as a sentence."""
    found = [f"{name} has an entry but no source" for name in records if name not in present]
    for name, record in records.items():
        about = record.get("latest") or record["passed"]
        if name in present and record["status"] not in ("unverified", "never run") and about["sha256"] != present[name]:
            found.append(f"{name} is called {record['status']}, but its source is not the one that ran")
    if not found and page != render(records):
        found.append("docs/gpu-status.md does not show the record")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.status", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true")
    action.add_argument("--refresh", action="store_true")
    action.add_argument("--update", type=Path, nargs="+", metavar="SUMMARY")
    action.add_argument("--times", type=Path, metavar="SUMMARY")
    parser.add_argument("--json", type=Path, metavar="FILE", help="with --times: the result file")
    options = parser.parse_args()
    if (options.times is None) != (options.json is None):
        parser.error("--times SUMMARY and --json FILE belong together")
    if options.times is not None:
        write_json(options.json, times(json.loads(options.times.read_text())), 1)
        return
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
