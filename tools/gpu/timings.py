"""Times the kernels against PyTorch: ``python -m tools.gpu.timings [--sets ...] [--more | --peers]``.

Cases and contenders are those of the families' benchmarks, at the sizes that they name for the suite; ours are timed
once per kernel set, side by side with eager PyTorch in one process. The first size of every family comes first, and
torch.compile, which takes longest, after both sizes of all, so that a run that is cut off has something of each.
``--peers`` takes the other libraries that are installed instead, ``--more`` further sizes. One JSON object per case; a
kernel that computes something wrong has failed. It needs torch alone.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks import family as kernel_family
from benchmarks import harness
from benchmarks.ceilings import measure_ceilings
from benchmarks.harness import Case, Effort, Tensors
from scan_fast.ops import native
from scan_fast.ops.tracing import trace_launches

from .process import SETS, emit, kernel_set, prefer

OURS, COMPILED = "scan-fast", "torch.compile"
PLAIN = ("eager", "eager TF32", "eager autocast bfloat16", "eager, static shapes")
COMPILE_SECONDS = 6.0  # estimate for a case with torch.compile whose cache was filled before


def _copies(inputs: Callable[[int], Tensors]) -> Callable[[int], Tensors]:
    """Draw inputs once and copy them for the other seeds: a cache sees new memory, and a CPU draws slowly."""
    first = lru_cache(maxsize=1)(lambda: inputs(0))

    def copy(seed: int) -> Tensors:
        if seed == 0:
            return first()
        return tuple(x.detach().clone().requires_grad_(x.requires_grad) for x in first())

    return copy


def _announced(about: dict[str, Any], name: str, sets: Sequence[str], run: Callable[..., Any]) -> Callable[..., Any]:
    """Print before a contender's first call which sets run from now on, so that a crash is attributed to one."""
    said = False

    def announce(*inputs: Tensor) -> Any:
        nonlocal said
        if not said:
            said = True
            emit({**about, "begin": f"{about['case']}, {name}", "sets": list(sets)})
        return run(*inputs)

    return announce


def case_of(family: str, size: str, device: str, sets: list[str], names: Callable[[str], bool]) -> Case:
    """Return a case whose contenders are the others that ``names`` takes, then ours by kernel set."""
    case = kernel_family.load(family).case(size, device)
    others, ours = [], []
    about = {"case": size, "family": family}
    for contender in case.contenders:
        if not contender.name.startswith(OURS):
            if names(contender.name):
                run = _announced(about, contender.name, (), contender.run)
                others.append(replace(contender, run=run))
            continue
        for kernels in sets:

            def run_set(*inputs: Tensor, k: str = kernels, run: Callable[..., Any] = contender.run) -> Any:
                prefer(family, k)
                return run(*inputs)

            name = f"{contender.name} {kernels}"
            # The rounds begin after the last contender: from then on any of ours may be the cause of a crash.
            owners = [f"{family}:{k}" for k in (sets if kernels == sets[-1] else (kernels,))]
            ours.append(replace(contender, name=name, run=_announced(about, name, owners, run_set)))
    return replace(case, inputs=_copies(case.inputs), contenders=[*others, *ours])


def _kernels_of(case: Case, device: str) -> list[list[str]]:
    """Return which of our kernels each contender runs; a set may leave a size to the portable kernels."""
    inputs = case.inputs(0)
    found = []
    for contender in case.contenders:
        with trace_launches() as ran, contender.settings():
            if contender.name.startswith(OURS) and not contender.skipped:
                with contextlib.suppress(Exception):  # it was measured before: its failure is known
                    contender.run(*inputs)
        found.append(ran or [device])
    return found


def _plan(sets: Sequence[tuple[str, str]], places: Sequence[int], quick: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Yield family, size and kernel sets, the most important first."""
    chosen: dict[str, list[str]] = {}
    for family, kernels in sets:
        chosen.setdefault(family, []).append(kernels)
    for place in places:
        for family, kernel_sets in chosen.items():
            benchmark = kernel_family.load(family)
            sizes = benchmark.quick_sizes if quick else benchmark.suite_sizes
            if place < len(sizes):
                yield family, sizes[place], kernel_sets


def measure(
    family: str, size: str, kernel_sets: list[str], case: Case, options: argparse.Namespace, against: str
) -> None:
    """Time one case and print its results; ``against`` names the kind of the other contenders."""
    about = {"stage": options.stage, "family": family}
    ceilings = measure_ceilings(options.device, quick=options.quick)
    effort = harness.QUICK if options.quick else Effort(rounds=9, case_seconds=1.2, least_rounds=3)
    results = harness.measure(case, options.device, effort, ceilings)
    for result, ran in zip(results, _kernels_of(case, options.device), strict=True):
        if result["name"].startswith(OURS):
            result["ran"] = ran
    for kernels in kernel_sets:
        ours = [r for r in results if r["name"].startswith(OURS) and r["name"].endswith(f" {kernels}")]
        # Too little memory is no failure of a kernel.
        wrong = [r for r in ours if "failed" in r and not r["failed"].startswith("OutOfMemory")]
        problem = "; ".join(f"{r['name']}: {r['failed']}" for r in wrong)
        ran = sorted({name for r in ours for name in r.get("ran", [])})
        emit(
            {
                **about,
                "kernels": kernels,
                "case": f"{size}, {against}",
                "passed": not problem,
                "problem": problem,
                "ran": ran,
            }
        )
    ours_first = sorted(results, key=lambda result: not result["name"].startswith(OURS))
    emit({**about, "kernels": kernel_sets[-1], "timing": size, "contenders": ours_first})
    if options.device == "cuda":
        torch.cuda.empty_cache()


def compile_only(options: argparse.Namespace) -> None:
    """Call the compiled contender of each case once, which fills torch.compile's cache on disk."""
    for family, size, _ in _plan(options.sets, (0,) if options.quick else (0, 1), options.quick):
        case = kernel_family.load(family).case(size, options.device)
        for contender in case.contenders:
            if contender.name == COMPILED and not contender.skipped:
                with contender.settings():
                    contender.run(*case.inputs(0))
                emit({"stage": options.stage, "compiled": f"{family} {size}"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.timings", description=__doc__)
    parser.add_argument("--stage", default="timings")
    parser.add_argument("--sets", nargs="+", type=kernel_set, default=list(SETS), metavar="FAMILY:KERNELS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a rehearsal, not a result")
    parser.add_argument("--more", action="store_true", help="further sizes instead of the first two")
    parser.add_argument("--peers", action="store_true", help="other libraries instead of PyTorch")
    parser.add_argument("--compile", action="store_true", help="only fill the cache of torch.compile")
    parser.add_argument("--seconds", type=float, default=60.0, help="no case begins later than this")
    options = parser.parse_args()
    end = time.perf_counter() + options.seconds
    if not native.is_available():
        raise SystemExit(f"the compiled module cannot be loaded: {native.load_error}")
    emit({"started": options.stage})
    if options.compile:
        compile_only(options)
        return
    emit({"stage": options.stage, "ceilings": measure_ceilings(options.device, quick=options.quick)})

    def eager(name: str) -> bool:
        return name in PLAIN

    def compiled(name: str) -> bool:
        return name in ("eager", COMPILED)

    def peers(name: str) -> bool:
        return not name.startswith("eager") and name != COMPILED

    places = (2, 3) if options.more else (0, 1)
    passes = [(peers, 0.0)] if options.peers else [(eager, 0.0), (compiled, 0.0 if options.quick else COMPILE_SECONDS)]
    for names, needed in passes:
        # A rehearsal on a slow machine compiles one size of each.
        of_pass = places[:1] if options.quick and names is compiled else places
        for family, size, kernel_sets in _plan(options.sets, of_pass, options.quick):
            if time.perf_counter() + needed > end:
                what = COMPILED if names is compiled else "case"
                emit({"stage": options.stage, "note": f"the time is up before the {what} of {family} {size}"})
                break
            case = case_of(family, size, options.device, kernel_sets, names)
            if names is not eager and all(c.skipped or c.name.startswith(OURS) for c in case.contenders):
                continue
            if names is compiled and not any(c.name == COMPILED for c in case.contenders):
                continue
            measure(family, size, kernel_sets, case, options, names.__name__)
    for family, kernels in options.sets:
        emit({"done": True, "stage": options.stage, "family": family, "kernels": kernels})


if __name__ == "__main__":
    main()
