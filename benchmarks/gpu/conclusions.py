"""What the lines of the GPU suite's stages mean: per kernel set what ran, what failed, and whether it is verified.

A set is a family and its kernels, "nt_xent:sm90". Standard library only: the suite's own process loads no torch.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GATING = ("smoke", "accuracy", "repeat", "graph", "memcheck")
"""The stages that a set must pass; the timings only fail a set that computes something wrong while it is timed."""
VERIFIED, FAILED, PARTLY, NEVER = "verified", "failed", "partly run", "never run"


def load(path: str) -> ModuleType:
    """Return a module of the tree by its file, without its package, which would load torch and the compiled module."""
    name = "gpu_suite_" + Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


def kernel_sets() -> dict[str, str]:
    """Return the CUDA source of each kernel set: ``{"nt_xent:portable": "nt_xent/nt_xent_cuda", ...}``."""
    families = load("scan_fast/ops/families.py").GPU_FAMILIES
    found = {f"{family.name}:portable": family.portable for family in families}
    return found | {f"{family.name}:sm90": family.sm90 for family in families if family.sm90}


def source_hashes() -> dict[str, str]:
    """Return the hash of each CUDA source of the tree by its name."""
    status = load("scan_fast/gpu_status.py")
    csrc = ROOT / "csrc"
    return {name: status.source_hash(csrc, path) for name, path in status.kernels_of(csrc).items()}


def gating(kernel_set: str) -> tuple[str, ...]:
    """Return the stages that a set must pass. The host reads the views' recipes: no graph can hold them."""
    return tuple(stage for stage in GATING if stage != "graph" or not kernel_set.startswith("augment:"))


def empty() -> dict[str, Any]:
    """Return what is known of one stage of one set before it has run."""
    return {"cases": 0, "failed": [], "ran": [], "done": False, "lost": ""}


def note(sets: dict[str, Any], line: dict[str, Any]) -> None:
    """Take one line of a stage into what is known of the sets."""
    if not line.get("family") or "kernels" not in line:
        return
    stages = sets[f"{line['family']}:{line['kernels']}"]["stages"]
    stage = stages.setdefault(line["stage"], empty())
    if "passed" in line:
        stage["cases"] += 1
        stage["ran"] = sorted({*stage["ran"], *line.get("ran", [])})
        if not line["passed"]:
            stage["failed"].append(f"{line['case']}: {line['problem']}")
    elif line.get("done"):
        stage["done"] = True


def verdict(kernel_set: str, stages: dict[str, Any], waived: Iterable[str] = ()) -> tuple[str, str]:
    """Return a set's status and the reason in one line.

    Args:
        kernel_set: such as "nt_xent:sm90".
        stages: what is known by stage, as :func:`note` fills it.
        waived: gating stages that this machine cannot run.
    """
    for name, stage in stages.items():
        if stage["lost"]:
            return FAILED, f"{name}: {stage['lost']}"
        if stage["failed"]:
            more = f" and {len(stage['failed']) - 1} more" if len(stage["failed"]) > 1 else ""
            return FAILED, f"{name}: {stage['failed'][0]}{more}"
    if not any(stage["cases"] for stage in stages.values()):
        return NEVER, ""
    wanted = [name for name in gating(kernel_set) if name not in tuple(waived)]
    missing = [name for name in wanted if not (stages.get(name, empty())["done"] and stages[name]["cases"])]
    return (PARTLY, f"not finished: {', '.join(missing)}") if missing else (VERIFIED, "")


def conclude(summary: dict[str, Any]) -> None:
    """Write every kernel's status into a summary, from its sets."""
    waived = [name for name, stage in summary["stages"].items() if stage["status"].startswith("not here")]
    kernels = {}
    for kernel_set, known in summary["sets"].items():
        status, reason = verdict(kernel_set, known["stages"], waived)
        cases = sum(stage["cases"] for stage in known["stages"].values())
        kernels[known["source"]] = {
            "sha256": known["sha256"],
            "status": status,
            "reason": reason,
            "cases": cases,
            "waived": waived,
        }
    summary["kernels"] = kernels


def merge(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one summary of several runs of the same kind on the same model of GPU, in their order.

    A stage that ran again replaces what it said before about a set; a set whose source has changed starts anew.

    Raises:
        ValueError: for rehearsals among results, or different devices.
    """
    kinds = {(summary["rehearsal"], summary["environment"].get("device")) for summary in summaries}
    if len(kinds) != 1:
        names = ", ".join(sorted(f"{'a rehearsal on ' if r else ''}{device}" for r, device in kinds))
        raise ValueError(f"the summaries are of different machines: {names}")
    merged: dict[str, Any] = {**summaries[-1], "stages": {}, "sets": {}, "timings": [], "notes": []}
    for summary in summaries:
        for name, stage in summary["stages"].items():
            if name not in merged["stages"] or stage["seconds"] > 0:
                merged["stages"][name] = stage
        for kernel_set, known in summary["sets"].items():
            before = merged["sets"].get(kernel_set)
            if before is None or before["sha256"] != known["sha256"]:
                merged["sets"][kernel_set] = {**known, "stages": dict(known["stages"])}
            else:
                before["stages"].update(known["stages"])
        times = {(t["stage"], t["family"], t["timing"]): t for t in (*merged["timings"], *summary["timings"])}
        merged["timings"] = list(times.values())
        merged["step"] = summary["step"] or merged["step"]
        merged["notes"] += [text for text in summary["notes"] if text not in merged["notes"]]
    conclude(merged)
    return merged
