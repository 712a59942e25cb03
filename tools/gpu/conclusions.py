"""Concludes from the lines of the GPU suite's stages: what ran of each kernel set, what failed, what is verified.

A set is a family and its kernels, "nt_xent:sm90". Standard library only: the process of the suite loads no torch.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GATING = ("smoke", "accuracy", "repeat", "graph", "memcheck")
"""Stages that a set must pass. The timings only fail a set that computes something wrong while it is timed."""
SANITIZERS = ("memcheck", "initcheck", "racecheck")
"""Stages under compute-sanitizer. A failure there without a complaint is one of the tool."""
COUNTING = (*GATING, "timings", "peers", "more")
"""Stages in which a failure is a failure of the kernel; the others inform."""
VERIFIED, FAILED, PARTLY, NEVER = "verified", "failed", "partly run", "never run"


def load(path: str) -> ModuleType:
    """Import a module of the tree by its file, without its package, which would load torch and the compiled module."""
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


def empty() -> dict[str, Any]:
    """Return the record of one stage of one set before it has run.

    ``cases`` by label: ``problem``, ``ran`` and ``seconds``; ``lost``: why a process ended within this set;
    ``complaints``: of compute-sanitizer; ``exempt``: why the stage makes no sense for the set, "" if it does; ``done``:
    whether all cases have finished.
    """
    return {"cases": {}, "complaints": [], "lost": "", "exempt": "", "done": False}


def note(sets: dict[str, Any], line: dict[str, Any]) -> None:
    """Add one line of a stage to the records of the sets."""
    known = sets.get(f"{line.get('family')}:{line.get('kernels')}")
    if known is None:
        return
    stage = known["stages"].setdefault(line["stage"], empty())
    if "complaint" in line:
        stage["complaints"].append(f"{line['begin']}: {line['complaint']}")
    elif "passed" in line:
        case = {"problem": "" if line["passed"] else line.get("problem") or "failed"}
        stage["cases"][line["case"]] = case | {key: line[key] for key in ("ran", "seconds") if key in line}
    elif "exempt" in line:
        stage["exempt"] = line["exempt"]
    elif line.get("done"):
        stage["done"] = True


def failures(name: str, stage: dict[str, Any]) -> list[str]:
    """Return the entries of a stage's record of a set that show that the kernels are wrong."""
    if name not in COUNTING:
        return []
    found = [f"{label}: {case['problem']}" for label, case in stage["cases"].items() if case["problem"]]
    if name in SANITIZERS:
        return list(stage["complaints"])
    return ([stage["lost"]] if stage["lost"] else []) + found


def is_through(stage: dict[str, Any] | None) -> bool:
    """Return whether all cases of a stage have finished, and there were some or need not be."""
    return stage is not None and stage["done"] and bool(stage["cases"] or stage["exempt"]) and not stage["lost"]


def verdict(stages: dict[str, Any], waived: Iterable[str] = ()) -> tuple[str, str]:
    """Return a set's status and the reason in one line.

    Args:
        stages: the records by stage, as :func:`note` fills them.
        waived: gating stages that this machine cannot run.
    """
    wrong = [f"{name}: {text}" for name, stage in stages.items() for text in failures(name, stage)]
    if wrong:
        return FAILED, wrong[0] + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")
    if not any(stage["cases"] for stage in stages.values()):
        return NEVER, ""
    missing = []
    for name in GATING:
        stage = stages.get(name)
        if name in tuple(waived):
            continue
        if not is_through(stage):
            missing.append(name + (f" ({stage['lost']})" if stage and stage["lost"] else ""))
        elif problems := [case["problem"] for case in stage["cases"].values() if case["problem"]]:  # type: ignore[index]
            missing.append(f"{name} ({problems[0]})")
    return (PARTLY, f"not finished: {', '.join(missing)}") if missing else (VERIFIED, "")


def conclude(summary: dict[str, Any]) -> None:
    """Write every kernel's status into a summary, from its sets."""
    waived = [name for name, stage in summary["stages"].items() if stage["status"].startswith("not here")]
    kernels = {}
    for known in summary["sets"].values():
        status, reason = verdict(known["stages"], waived)
        kernels[known["source"]] = {
            "sha256": known["sha256"],
            "status": status,
            "reason": reason,
            "cases": sum(len(stage["cases"]) for stage in known["stages"].values()),
            "waived": [name for name in waived if name in GATING],
        }
    summary["kernels"] = kernels


def merge(summaries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one summary of several runs of the same kind on the same model of GPU, in their order.

    The later result of a case counts, as long as the source of the set is the same; otherwise the earlier ones of the
    set are dropped.

    Raises:
        ValueError: rehearsals among results, or different devices.
    """
    kinds = {(summary["rehearsal"], summary["environment"].get("device")) for summary in summaries}
    if len(kinds) != 1:
        names = ", ".join(sorted(f"{'a rehearsal on ' if r else ''}{device or 'no device'}" for r, device in kinds))
        raise ValueError(f"the summaries are of different machines: {names}")
    merged: dict[str, Any] = {**summaries[-1], "stages": {}, "sets": {}, "timings": [], "step": [], "notes": []}
    for summary in summaries:
        for name, stage in summary["stages"].items():
            if name not in merged["stages"] or stage["seconds"] > 0:
                merged["stages"][name] = stage
        for kernel_set, known in summary["sets"].items():
            before = merged["sets"].get(kernel_set)
            if before is None or before["sha256"] != known["sha256"]:
                merged["sets"][kernel_set] = copy.deepcopy(known)
                continue
            for name, stage in known["stages"].items():
                before["stages"][name] = _both(before["stages"].get(name, empty()), stage)
        times = {_which(timing): timing for timing in (*merged["timings"], *summary["timings"])}
        merged["timings"] = list(times.values())
        merged["step"] = summary["step"] or merged["step"]
        merged["notes"] += [text for text in summary["notes"] if text not in merged["notes"]]
    merged["finished"] = all(summary["finished"] for summary in summaries)
    conclude(merged)
    return merged


def _which(timing: dict[str, Any]) -> tuple[Any, ...]:
    return timing["stage"], timing["family"], timing["timing"], tuple(c["name"] for c in timing["contenders"])


def _both(earlier: dict[str, Any], later: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's record after it ran twice. What ended a process counts until the stage has finished once."""
    if later["done"] and not later["lost"]:
        complaints, lost = later["complaints"], ""
    else:
        complaints, lost = earlier["complaints"] + later["complaints"], later["lost"] or earlier["lost"]
    cases = {**earlier["cases"], **copy.deepcopy(later["cases"])}
    done, exempt = earlier["done"] or later["done"], earlier["exempt"] or later["exempt"]
    return {"cases": cases, "complaints": complaints, "lost": lost, "exempt": exempt, "done": done}
