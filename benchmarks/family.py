"""The benchmark of a kernel family: sizes, targets and the command line ``python -m benchmarks.NAME``.

Each family of scan_fast/ops/families.py has a module of its name here, which defines ``FAMILY``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from scan_fast.ops.families import FAMILIES

from . import files, memory
from .ceilings import measure_ceilings
from .environment import describe
from .harness import QUICK, Case, Effort, measure


@dataclass(frozen=True)
class Target:
    """A bound that a contender must keep at a size; exactly one of the numbers is given.

    Attributes:
        size: in the family's notation.
        contender: the one that is judged.
        peer: what ``times`` compares with.
        times: at least so many times faster than the peer.
        megabytes: at most 10^6 bytes beyond inputs and outputs.
        microseconds: at most this time; on CUDA, device time.
        share: at least this share of the limit, the speed that the machine's measured rates allow.
        without_amx: measured with the AMX units of the CPU switched off.
    """

    size: str
    contender: str = "scan-fast"
    peer: str = "eager"
    times: float | None = None
    megabytes: float | None = None
    microseconds: float | None = None
    share: float | None = None
    without_amx: bool = False

    def value(self, contenders: Sequence[dict[str, Any]]) -> float | None:
        """Return the measured figure; None if something could not be measured."""
        by_name = {result["name"]: result for result in contenders}
        ours = by_name.get(self.contender, {})
        if self.microseconds is not None:
            return float(ours["seconds"]) * 1e6 if "seconds" in ours else None
        if self.share is not None:
            return float(ours["of_limit"]) if "of_limit" in ours else None
        if self.megabytes is not None:
            peak = ours.get("memory_bytes")
            return None if peak is None else float(peak) / 1e6
        peer = by_name.get(self.peer, {})
        return float(peer["seconds"] / ours["seconds"]) if "seconds" in peer and "seconds" in ours else None

    def is_met(self, value: float | None) -> bool:
        """Return whether a measured value meets the target; None does not."""
        if value is None:
            return False
        most = self.megabytes if self.megabytes is not None else self.microseconds
        if most is not None:
            return value <= most
        least = self.share if self.share is not None else self.times
        return value >= (least or 0.0)

    def __str__(self) -> str:
        where = f"{self.size}, {self.contender}{' without AMX' if self.without_amx else ''}"
        if self.microseconds is not None:
            return f"{where}: at most {self.microseconds:g} us"
        if self.share is not None:
            return f"{where}: {self.share:.0%} of the limit"
        if self.megabytes is not None:
            return f"{where}: at most {self.megabytes:g} MB beyond inputs and gradients"
        return f"{where}: {self.times:g} x {self.peer}"


@dataclass(frozen=True)
class Family:
    """The benchmark of one operation.

    Attributes:
        name: of the kernel family, and of the module.
        title: of tables and charts.
        case: builds a case from a size and a device type.
        sizes: by device type, smallest first.
        quick_sizes: for rehearsals, any device.
        memory_sizes: by device type, those at which peak memory is measured, too.
        suite_sizes: what the GPU suite times, the most important first: two always, the others if time is left.
        targets: by kind of device, see :func:`benchmarks.environment.kind_of`.
    """

    name: str
    title: str
    case: Callable[[str, str], Case]
    sizes: Mapping[str, Sequence[str]]
    quick_sizes: Sequence[str]
    memory_sizes: Mapping[str, Sequence[str]]
    suite_sizes: Sequence[str] = ()
    targets: Mapping[str, Sequence[Target]] = field(default_factory=dict)


def load(name: str) -> Family:
    """Return the benchmark of a kernel family."""
    family: Family = importlib.import_module(f"benchmarks.{name}").FAMILY
    return family


def load_all() -> dict[str, Family]:
    """Return the benchmarks of all kernel families by name."""
    return {name: load(name) for name in FAMILIES}


def run_family(
    family: Family,
    device: str,
    sizes: Sequence[str],
    effort: Effort,
    contenders: Sequence[str] = (),
    memory_sizes: Sequence[str] = (),
    file: Path | None = None,
) -> dict[str, Any]:
    """Measure a family at some sizes and return the result as plain values, ready for JSON.

    Args:
        family: the benchmark.
        device: ``"cpu"`` or ``"cuda"``.
        sizes: in the family's notation.
        effort: of each size.
        contenders: names to keep; empty for all.
        memory_sizes: sizes at which peak memory is measured, too.
        file: gets the result after every size, so that an interruption loses one size at most.
    """
    ceilings = measure_ceilings(device, quick=effort is QUICK)
    cases: list[dict[str, Any]] = []
    family_result = {
        "benchmark": family.name,
        "title": family.title,
        "device": device,
        "environment": describe(device),
        "ceilings": ceilings,
        "quick": effort is QUICK,
        "cases": cases,
    }
    for size in sizes:
        case = family.case(size, device)
        if contenders:
            kept = [contender for contender in case.contenders if contender.name in contenders]
            case = dataclasses.replace(case, contenders=kept)
        print(f"{family.title}, {case.name}")
        results = measure(case, device, effort, ceilings)
        if size in memory_sizes:
            for result in results:
                if "seconds" in result:
                    result["memory_bytes"] = memory.peak_beyond(family.name, size, result["name"], device)
        cases.append({"size": case.name, "contenders": results})
        print(table(results))
        if file is not None:
            files.write_json(file, family_result)
        if device == "cuda":
            torch.cuda.empty_cache()
    return family_result


def human_seconds(seconds: float) -> str:
    """Format a duration with three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale or unit == "us":
            return f"{seconds / scale:.3g} {unit}"
    raise AssertionError


def table(results: Sequence[dict[str, Any]]) -> str:
    """Format the contenders of one case for the terminal; ``x eager`` is how many times faster than eager."""
    eager = next((r["seconds"] for r in results if r["name"] == "eager" and "seconds" in r), None)
    lines = [
        f"  {'':<26}{'median':>10}{'p10':>10}{'p90':>10}{'call':>10}{'x eager':>9}{'limit':>10}{'of it':>7}"
        f"{'memory':>11}{'error':>9}"
    ]
    for r in results:
        if "seconds" not in r:
            lines.append(f"  {r['name']:<26}{r.get('skipped') or r.get('failed')}")
            continue
        call = human_seconds(r["call_seconds"]) if "call_seconds" in r else ""
        faster = f"{eager / r['seconds']:.2f}" if eager else ""
        bound = human_seconds(r["limit_seconds"]) if "limit_seconds" in r else ""
        share = f"{r['of_limit']:.0%}" if "of_limit" in r else ""
        memory_text = f"{r['memory_bytes'] / 2**20:.1f} MiB" if r.get("memory_bytes") is not None else ""
        lines.append(
            f"  {r['name']:<26}{human_seconds(r['seconds']):>10}{human_seconds(r['seconds_p10']):>10}"
            f"{human_seconds(r['seconds_p90']):>10}{call:>10}{faster:>9}{bound:>10}{share:>7}{memory_text:>11}"
            f"{r['error']:>9.0e}"
        )
    return "\n".join(lines)


def main(family: Family, arguments: Sequence[str] | None = None) -> None:
    """Run one family's command line."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{family.name}", description=family.title)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--quick", action="store_true", help="small sizes and few rounds: a rehearsal, not a result")
    parser.add_argument("--sizes", nargs="+", help="sizes such as " + " ".join(family.quick_sizes))
    parser.add_argument("--contenders", nargs="+", default=(), help="only these")
    parser.add_argument("--no-memory", action="store_true", help="leave out the measurement of peak memory")
    parser.add_argument("--case-seconds", type=float, help="stop a case's rounds after this time")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch sees no GPU")
    effort = QUICK if options.quick else Effort(case_seconds=options.case_seconds or Effort.case_seconds)
    sizes = options.sizes or (family.quick_sizes if options.quick else family.sizes[options.device])
    if not sizes:
        parser.error(f"--device {options.device}: this family has no sizes for it; give --sizes or another device")
    memory_sizes = (
        () if options.no_memory else family.quick_sizes[:1] if options.quick else family.memory_sizes[options.device]
    )
    run_family(family, options.device, sizes, effort, options.contenders, memory_sizes, options.json)
