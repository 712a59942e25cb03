"""Measures the performance targets of this project: ``python -m benchmarks.targets --device cpu [--json FILE]``.

Prints target, measured value and pass or fail per line, and exits with status 1 unless all are met. Run it on an idle
machine, although every ratio is between contenders that were measured in turns in one process. There are targets for
each class of processor: AMX, AVX-512 and AVX2. ``SCAN_FAST_CPU_ISA`` lowers the class, but not the instructions that
PyTorch uses. The targets of a kernel family are listed in its module; those of the class AMX that say "without AMX" run
in a separate process. The targets of whole stages (``--family end_to_end``) depend on the images of ``--data``, see
:mod:`benchmarks.end_to_end`; ``--end-to-end`` reads them from a result of that benchmark.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scan_fast.ops import native

from . import family, files
from .environment import CPU_CLASSES, cpu_class, describe, kind_of
from .family import Family, Target
from .harness import Effort

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class ViewTarget:
    """A rate of ``side`` x ``side`` views: views per second of the fused kernel, or ``times`` torchvision on PIL."""

    view: str
    side: int
    per_second: float | None = None
    times: float | None = None
    contender: str = "fused"

    def value(self, result: dict[str, Any]) -> float | None:
        """Return the measured rate from a result of :mod:`benchmarks.views`."""
        from . import views  # needs torchvision and Pillow

        entry = next((e for e in result["results"] if (e["view"], e["side"]) == (self.view, self.side)), None)
        rates = entry["rates"] if entry else {}
        if self.times is not None:
            ours, peer = rates.get(self.contender), rates.get(views.PIL)
            return float(ours["views_per_second"] / peer["views_per_second"]) if ours and peer else None
        rate = rates.get(views.KERNEL)
        return None if rate is None else float(rate["views_per_second"])

    def is_met(self, value: float | None) -> bool:
        """Return whether a measured value meets the target; None does not."""
        return value is not None and value >= (self.times or self.per_second or 0.0)

    def __str__(self) -> str:
        if self.times is not None:
            return f"views {self.view} {self.side}x{self.side}, {self.contender}: {self.times:g} x torchvision on PIL"
        return f"views {self.view} {self.side}x{self.side}: {self.per_second or 0:,.0f} a second"


VIEW_TARGETS: dict[str, tuple[ViewTarget, ...]] = {
    "cpu-amx": (
        ViewTarget("simclr", 32, times=15.0),
        ViewTarget("simclr", 32, times=4.0, contender="dali"),
        ViewTarget("strong", 32, times=12.0),
    ),
    "cuda": (ViewTarget("simclr", 32, 1e7),),
}
SEARCH_SIZE = "50000x128x20"


@dataclass(frozen=True)
class StageTarget:
    """A bound on a stage.

    Attributes:
        stage: of a run; or "search", the neighbour search alone.
        times: an epoch must be so many times faster than the baseline's, the search than that of faiss.
        differ: the losses of the first float32 step may differ from the baseline's by this share at most.
        convolutions: PyTorch's convolutions of the network, measured alone, must take at least this share of an epoch.
    """

    stage: str
    times: float | None = None
    differ: float | None = None
    convolutions: float | None = None

    def value(self, result: dict[str, Any]) -> float | None:
        """Return the measured ratio or difference from a result of :mod:`benchmarks.end_to_end`."""
        if self.stage == "search":
            search = result.get("search", {})
            wanted = search.get("size") == SEARCH_SIZE
            return Target(SEARCH_SIZE, peer="faiss IndexFlatIP").value(search["contenders"]) if wanted else None
        entry = next((e for e in result["stages"] if e["stage"] == self.stage), None)
        if entry is None:
            return None
        if self.convolutions is not None:
            share = entry["ours"].get("of_pytorch_convolutions")  # older results do not have it
            return None if share is None else float(share)
        if self.differ is None:
            return float(entry["ratio"])
        ours, theirs = entry["losses"][0]
        return abs(ours - theirs) / max(1.0, abs(theirs))

    def is_met(self, value: float | None) -> bool:
        """Return whether a measured value meets the target; None does not."""
        if value is None:
            return False
        if self.differ is not None:
            return value <= self.differ
        return value >= (self.times or self.convolutions or 0.0)

    def __str__(self) -> str:
        if self.differ is not None:
            return f"end_to_end {self.stage}: float32 losses within {self.differ:g} of the baseline's"
        if self.convolutions is not None:
            return f"end_to_end {self.stage}: PyTorch's convolutions alone take {self.convolutions:.0%} of an epoch"
        what = f"faiss IndexFlatIP, {SEARCH_SIZE}" if self.stage == "search" else "an epoch of the baseline"
        return f"end_to_end {self.stage}: {self.times:g} x {what}"


EQUAL_LOSSES = tuple(StageTarget(stage, differ=1e-5) for stage in ("pretext", "clustering", "selflabel"))
# Little else takes time. With AVX-512-BF16 an epoch takes less time than PyTorch's convolutions alone.
STAGES_WITHOUT_AMX = (StageTarget("pretext", convolutions=0.9), *EQUAL_LOSSES)
STAGE_TARGETS: dict[str, tuple[StageTarget, ...]] = {
    "cpu-amx": (
        StageTarget("pretext", times=4.0),
        StageTarget("clustering", times=4.0),
        StageTarget("selflabel", times=4.0),
        StageTarget("search", times=3.0),
        *EQUAL_LOSSES,
    ),
    "cpu-avx512": STAGES_WITHOUT_AMX,
    "cpu-avx2": STAGES_WITHOUT_AMX,
}


def _result_of(benchmark: str, device: str, *options: str) -> dict[str, Any]:
    """Run a benchmark in a separate process and return its result."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--device", device, "--json", str(file), *options]
        subprocess.run(command, cwd=ROOT, check=True)
        result: dict[str, Any] = json.loads(file.read_text())
    return result


def measure_stages(device: str, data: Path | None, budget: float) -> dict[str, Any]:
    """Run :mod:`benchmarks.end_to_end` and return its result."""
    options = ["--data", str(data.resolve())] if data else []
    return _result_of("end_to_end", device, "--budget", str(budget), *options)


def measure(of: Family, kind: str, effort: Effort) -> list[dict[str, Any]]:
    """Measure what the targets of a family need, each size once, and return one plain dictionary per target.

    ``kind`` is that of :func:`benchmarks.environment.kind_of`.
    """
    targets, device = of.targets.get(kind, ()), kind.partition("-")[0]
    measured: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for key in dict.fromkeys((t.size, t.without_amx) for t in targets):
        size, without_amx = key
        wanted = [t for t in targets if (t.size, t.without_amx) == key]
        # A bound on our own figure needs no peer.
        names = sorted({name for t in wanted for name in (t.contender, *([t.peer] if t.times is not None else []))})
        memory_sizes = [size] if any(t.megabytes is not None for t in wanted) else []
        if without_amx:
            measured[key] = _without_amx(of.name, size, names, device, effort)
        else:
            result = family.run_family(of, device, [size], effort, names, memory_sizes)
            measured[key] = result["cases"][0]["contenders"]
    lines = []
    for target in targets:
        value = target.value(measured[target.size, target.without_amx])
        lines.append({"target": f"{of.name} {target}", "measured": value, "met": target.is_met(value)})
    return lines


def _without_amx(name: str, size: str, names: Sequence[str], device: str, effort: Effort) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", f"benchmarks.{name}", "--device", device, "--sizes", size, "--no-memory"]
        command += ["--case-seconds", str(effort.case_seconds), "--json", str(file), "--contenders", *names]
        # The kernels read this once, when they are loaded, and then run without AMX.
        subprocess.run(command, cwd=ROOT, env={**os.environ, "SCAN_FAST_CPU_ISA": "avx512"}, check=True)
        contenders: list[dict[str, Any]] = json.loads(file.read_text())["cases"][0]["contenders"]
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    families = family.load_all()
    parser.add_argument("--family", choices=[*families, "views", "end_to_end"], help="only this family's targets")
    parser.add_argument("--case-seconds", type=float, default=40.0, help="stop a case's rounds after this time")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the images of the stages' targets")
    parser.add_argument("--budget", type=float, default=2000, help="seconds for the stages' targets (default: 2000)")
    parser.add_argument("--end-to-end", type=Path, metavar="FILE", help="a result of benchmarks.end_to_end to judge")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    effort = Effort(case_seconds=options.case_seconds)
    build = native.build_info()
    kind = kind_of(options.device, build)
    if kind == "cpu-baseline":
        parser.error("there are no targets for a processor or a build without AVX2")
    print(f"Targets of {options.device if kind == 'cuda' else 'processors with ' + CPU_CLASSES[cpu_class(build)]}")
    wanted = [of for name, of in families.items() if options.family in (None, name)]
    lines = [line for of in wanted for line in measure(of, kind, effort)]
    if kind in VIEW_TARGETS and options.family in (None, "views"):
        rates = _result_of("views", options.device)
        for view_target in VIEW_TARGETS[kind]:
            got = view_target.value(rates)
            lines.append({"target": str(view_target), "measured": got, "met": view_target.is_met(got)})
    if kind in STAGE_TARGETS and options.family in (None, "end_to_end"):
        if options.end_to_end is not None:
            stages = json.loads(options.end_to_end.read_text())
            if stages["quick"]:
                parser.error(f"{options.end_to_end} was measured with --quick; measure it again without")
            if (other := kind_of(stages["device"], stages["environment"]["build"])) != kind:
                parser.error(f"{options.end_to_end} was measured on {other}, the other targets are those of {kind}")
        else:
            stages = measure_stages(options.device, options.data, options.budget)
        for stage_target in STAGE_TARGETS[kind]:
            got = stage_target.value(stages)
            lines.append({"target": str(stage_target), "measured": got, "met": stage_target.is_met(got)})
    if not lines:
        parser.error(f"there are no targets of {options.family} for {kind}")
    print()
    for line in lines:
        value = "not measured" if line["measured"] is None else f"{line['measured']:.3g}"
        print(f"{'pass' if line['met'] else 'FAIL'}  {line['target']:<78} {value:>12}")
    if options.json:
        result = {"benchmark": "targets", "device": options.device, "environment": describe(options.device)}
        files.write_json(options.json, result | {"targets": lines})
    if not all(line["met"] for line in lines):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
