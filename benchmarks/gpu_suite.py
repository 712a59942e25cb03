"""Everything that a GPU has to say about the kernels, in one command; run it as ``benchmarks/gpu_suite``.

Steps: build for this GPU, the CUDA tests of tests/ops, accuracy and repeatability on fresh inputs, compute-sanitizer,
and all kernel benchmarks; then, on compute capability 9.0, the same for the families with kernels for sm_90a, which the
former steps leave aside. Every step is a process with a time limit of its own, and a failure does not stop the next.
It needs torch, pytest, hypothesis and, for the build, nvcc, CMake, ninja and pybind11; no network, and nothing of the
driver's dependencies, but for the views: their tests and benchmark take torchvision and Pillow. The folder gets
summary.json (what ``python -m benchmarks.gpu_status --update`` reads, with the benchmarks' results inside), log.txt and
junit.xml.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("nt_xent", "scan_loss", "self_label", "batch_norm", "neighbors", "augment")
BENCHMARKS = {family: family for family in FAMILIES} | {"augment": "views"}
# Families with kernels for sm_90a, by the name of what is verified.
SM90 = {"nt_xent_sm90": "nt_xent", "neighbors_sm90": "neighbors"}
RESULTS = (*BENCHMARKS.values(), *SM90)  # files of the benchmarks, without suffix
TOTAL_SECONDS = 465


@dataclass
class Step:
    """A command with a time limit; ``families`` are those whose verification needs it (empty: it only reports).

    Among them are the keys of ``SM90``.
    """

    name: str
    command: Sequence[str]
    seconds: int
    families: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def architecture() -> str:
    """Return this GPU's architecture as the build wants it, e.g. ``90a``."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}{'a' if major >= 9 else ''}"


def plan(rehearse: bool, out: Path, build: bool) -> list[Step]:
    """Return the steps in order."""
    hopper = SM90 if not rehearse and architecture() == "90a" else {}
    steps = []
    if build:
        cuda = (
            {"SCAN_FAST_CUDA": "off"} if rehearse else {"SCAN_FAST_CUDA": "on", "SCAN_FAST_CUDA_ARCHS": architecture()}
        )
        command = (sys.executable, "setup.py", "build_ext", "--inplace")
        steps.append(Step("build", command, 240, (*FAMILIES, *hopper), cuda))
    steps += kernel_steps(FAMILIES, rehearse, out)
    for name, family in hopper.items():
        steps += [sm90_step(step, name) for step in kernel_steps((family,), rehearse, out, name)]
    # What only reports comes last.
    return sorted(steps, key=lambda step: not step.families)


def sm90_step(step: Step, name: str) -> Step:
    """Return a family's step with its kernels for sm_90a."""
    environment = step.environment | {"SCAN_FAST_GPU_KERNELS": "sm90"}
    family = "" if SM90[name] in step.name else f" {SM90[name]}"
    families = (name,) if step.families else ()
    return Step(f"{step.name}{family} sm90", step.command, step.seconds, families, environment)


def kernel_steps(families: Sequence[str], rehearse: bool, out: Path, name: str = "") -> list[Step]:
    """Return the steps about some families; ``name`` distinguishes the files of several such lists."""
    device = "cpu" if rehearse else "cuda"
    python = sys.executable
    portable = {"SCAN_FAST_GPU_KERNELS": "portable"}
    steps = []
    # -p no:cacheprovider leaves nothing behind; the project's own options may need plugins that are not here.
    files = [f"tests/ops/test_{family}.py" for family in families] if name else ["tests/ops"]
    tests = [python, "-m", "pytest", *files, "-q", "-k", device, "-o", "addopts=", "-p", "no:cacheprovider"]
    tests += ["--maxfail=40", f"--junitxml={out / junit(name)}"]
    steps.append(Step("tests", tests, 60 if name else 150, tuple(families), portable))
    small = ("--small",) if rehearse else ()
    for check in ("accuracy", "repeat", "graph"):
        command = (python, "-m", "benchmarks.gpu_checks", check, "--device", device, *small)
        only = ("--family", families[0]) if len(families) == 1 else ()
        # The host reads the views' recipes: there is nothing to record.
        about = tuple(family for family in families if check != "graph" or family != "augment")
        steps.append(Step(check, (*command, *only), 60, about, portable))
    sanitizer = shutil.which("compute-sanitizer")
    # Without its cache, PyTorch's every tensor is an allocation of its own, and the bounds of each are seen.
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} | portable
    for family in families:
        tiny = (python, "-m", "benchmarks.gpu_checks", "tiny", "--device", device, "--family", family)
        if rehearse:
            steps.append(Step(f"tiny {family}", tiny, 60, (family,), portable))
        elif sanitizer:
            for tool in ("memcheck", "initcheck"):
                command = (sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", *tiny)
                steps.append(Step(f"{tool} {family}", command, 45, (family,), uncached))
    for family in families:
        benchmark = BENCHMARKS[family]
        result = str(out / f"{name or benchmark}.json")
        command = (python, "-m", f"benchmarks.{benchmark}", "--device", device, "--json", result)
        if benchmark == "views":
            more: tuple[str, ...] = ("--quick",) if rehearse else ("--rounds", "3")
        else:
            more = ("--quick", "--no-memory") if rehearse else ("--case-seconds", "4")
        steps.append(Step(f"benchmark {benchmark}", (*command, *more), 75, (), portable))
    if sanitizer and not rehearse:
        for family in families:
            tiny = (python, "-m", "benchmarks.gpu_checks", "tiny", "--device", device, "--family", family)
            steps.append(Step(f"racecheck {family}", (sanitizer, "--tool", "racecheck", *tiny), 30, (), uncached))
    return steps


def junit(name: str = "") -> str:
    """Return the name of the tests' record: of all families, or of a key of ``SM90``."""
    return f"junit-{name}.xml" if name else "junit.xml"


def run(step: Step, seconds: float, log: Any) -> dict[str, Any]:
    """Run a step and return whether it passed, its seconds, and the end of its output."""
    if seconds < 5:
        return {"name": step.name, "status": "no time left", "passed": False, "seconds": 0.0, "output": ""}
    begin = time.monotonic()
    log.write(f"\n===== {step.name}: {' '.join(step.command)}\n")
    log.flush()
    # A process group of its own, so that a step that runs out of time takes its children with it.
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
        status = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = f"timed out after {seconds:.0f} s"
    log.write(output)
    log.flush()
    return {
        "name": step.name,
        "status": status,
        "passed": status == "passed",
        "seconds": round(time.monotonic() - begin, 1),
        "output": output,
    }


def families_failed(step: Step, result: dict[str, Any], out: Path) -> set[str]:
    """Return the families that a failed step is about: those its output names, or all it gates."""
    if result["passed"] or not step.families:
        return set()
    if step.name == "tests" and (out / junit()).exists():
        failed = set()
        for case in ElementTree.parse(out / junit()).iter("testcase"):
            if case.find("failure") is not None or case.find("error") is not None:
                failed.add(case.get("classname", "").rpartition("test_")[2].split(".")[0])
        if failed and "timed out" not in result["status"]:
            return {family for family in step.families if family in failed or not failed <= set(FAMILIES)}
    entries = [json.loads(line) for line in re.findall(r'^\{"family".*\}$', result["output"], re.MULTILINE)]
    if {entry["family"] for entry in entries} == set(step.families):
        return {entry["family"] for entry in entries if not entry["passed"]}
    return set(step.families)


def tests_ran(out: Path) -> dict[str, int]:
    """Return how many tests passed per family: a selection that matches nothing must not count as passed."""
    passed = dict.fromkeys((*FAMILIES, *SM90), 0)
    for name in ("", *SM90):
        if not (out / junit(name)).exists():
            continue
        for case in ElementTree.parse(out / junit(name)).iter("testcase"):
            family = case.get("classname", "").rpartition("test_")[2].split(".")[0]
            if (name or family) in passed and len(case) == 0:
                passed[name or family] += 1
    return passed


def summarize(steps: Sequence[Step], results: Sequence[dict[str, Any]], out: Path, rehearse: bool) -> dict[str, Any]:
    """Return the summary: environment, steps, which kernels passed everything that gates them, and the benchmarks."""
    from scan_fast import gpu_status

    from .environment import describe

    failed: set[str] = set()
    for step, result in zip(steps, results, strict=True):
        failed |= families_failed(step, result, out)
    verified = (*FAMILIES, *SM90)
    gating = {family: [s.name for s in steps if family in s.families] for family in verified}
    ran = tests_ran(out)
    kernels = {}
    csrc = ROOT / "csrc"
    for name, path in gpu_status.kernels_of(csrc).items():
        family, _, source = name.partition("/")
        if source in SM90:
            family = source
        complete = family in verified and any(check.startswith(("memcheck", "tiny")) for check in gating[family])
        kernels[name] = {
            "sha256": gpu_status.source_hash(csrc, path),
            "passed": complete and family not in failed and ran[family] > 0,
            "tests": ran.get(family, 0),
            "checks": gating.get(family, []),
        }
    benchmarks = {f: json.loads((out / f"{f}.json").read_text()) for f in RESULTS if (out / f"{f}.json").exists()}
    return {
        "rehearsal": rehearse,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": describe("cpu" if rehearse else "cuda"),
        "steps": [{key: r[key] for key in ("name", "status", "passed", "seconds")} for r in results],
        "notes": [f"{r['name']}: {line}" for r in results for line in _notes(r)],
        "kernels": kernels,
        "benchmarks": benchmarks,
    }


def _notes(result: dict[str, Any]) -> list[str]:
    """The lines of a step's output that belong in the summary: sanitizer totals, failures of checks, test totals."""
    patterns = (r"ERROR SUMMARY.*", r"RACECHECK SUMMARY.*", r'^\{"family".*"passed": false.*', r"^seed \d+")
    pattern = "|".join((*patterns, r"^=*\s*\d+ (?:passed|failed).*"))
    return [match.strip(" =") for match in re.findall(pattern, result["output"], re.MULTILINE)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu_suite", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(os.environ.get("OUT") or "gpu_suite_out"))
    parser.add_argument("--rehearse", action="store_true", help="the same steps on the CPU, with tiny sizes")
    parser.add_argument("--no-build", action="store_true", help="take the compiled module that is there")
    options = parser.parse_args()
    if not options.rehearse:
        import torch

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU; --rehearse runs the same steps on the CPU")
    out = options.folder.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for stale in ("summary.json", *map(junit, ("", *SM90)), *(f"{name}.json" for name in RESULTS)):
        (out / stale).unlink(missing_ok=True)
    steps = plan(options.rehearse, out, not options.no_build)
    begin = time.monotonic()
    results: list[dict[str, Any]] = []
    with (out / "log.txt").open("w") as log:
        for step in steps:
            # A rehearsal may be on a slow machine; what it shows is that the steps work.
            left = step.seconds * 4.0 if options.rehearse else TOTAL_SECONDS - (time.monotonic() - begin)
            result = run(step, left if options.rehearse else min(step.seconds, left), log)
            results.append(result)
            print(f"{result['status']:<24} {result['seconds']:7.1f} s  {step.name}", flush=True)
            if not result["passed"]:
                print("    " + "\n    ".join(result["output"].strip().splitlines()[-12:]), flush=True)
            elif step.name.startswith("benchmark"):
                print(result["output"], flush=True)
    summary = summarize(steps, results, out, options.rehearse)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print("\n" + "\n".join(summary["notes"]))
    for name, kernel in summary["kernels"].items():
        print(f"{'passed' if kernel['passed'] else 'NOT PASSED':<12} {name} ({kernel['tests']} tests)")
    print(
        f"{sum(r['passed'] for r in results)} of {len(results)} steps passed, {time.monotonic() - begin:.0f} s; {out}"
    )
    if not all(result["passed"] for step, result in zip(steps, results, strict=True) if step.families):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
