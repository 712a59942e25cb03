"""Times the kernels against PyTorch: ``python -m benchmarks.gpu.timings [--sets ...] [--more] [--seconds S]``.

The cases and contenders are those of ``benchmarks.nt_xent`` and the like; ours are timed once per kernel set, side by
side with eager PyTorch and torch.compile in one process. The first size of every family comes first, so that time that
ends leaves something of each. ``--peers`` adds the other libraries that are installed, ``--more`` takes further sizes.
One JSON object per case; a kernel that computes something wrong has failed. It needs torch alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from scan_fast.ops import native
from scan_fast.ops.tracing import trace_launches

from .. import batch_norm, harness, neighbors, nt_xent, scan_loss, self_label
from ..ceilings import Work, measure_ceilings
from ..harness import Case, Contender, Effort
from .cases import SETS, ViewCase, view_inputs, views
from .checks import _sets, emit, prefer

FAMILIES = {module.FAMILY.name: module.FAMILY for module in (nt_xent, scan_loss, self_label, batch_norm, neighbors)}
SIZES = {
    "nt_xent": ("8192x128", "1024x128", "65536x128", "8192x512"),
    "scan_loss": ("10x1024x1000", "1024x10", "10x4096x1000"),
    "self_label": ("1024x1000", "1000x10", "4096x1000"),
    "batch_norm": ("1024x64x32x32-bfloat16", "1024x64x32x32-bfloat16-residual", "1024x512x4x4-bfloat16-residual"),
    "neighbors": ("50000x512x20", "20000x512x20", "100000x128x50", "1281167x128x50"),
    "augment": ("1024x32x32", "256x256x224", "1024x96x96"),
}
"""The first two of each are timed, and the others with ``--more``."""
PLAIN = ("eager", "eager TF32", "eager autocast bfloat16", "eager, static shapes")
COMPILED = "torch.compile"
COMPILE_SECONDS = 15.0  # what a case with torch.compile needs more, at a guess


def _augment(size: str, device: str) -> Case:
    """Views of random recipes; there is no eager form that needs torch alone."""
    case = ViewCase(*map(int, size.split("x")))

    def inputs(seed: int) -> tuple[torch.Tensor, ...]:
        images, recipes = view_inputs(case, seed)
        return images.to(device), recipes

    def ours(images: torch.Tensor, recipes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (views(images, recipes, case.side, torch.float32),)

    def exact(images: torch.Tensor, recipes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (views(images.cpu(), recipes, case.side, torch.float32).double(),)

    work = Work(flops=0.0, bytes=case.count * (3.0 * case.source**2 + 12.0 * case.side**2))
    return Case(size, inputs, exact, [Contender("scan-fast", ours, 0.0, work, capturable=False)])


def _with(family: str, kernels: str, run: Callable[..., Any], *inputs: torch.Tensor) -> Any:
    prefer(family, kernels)
    return run(*inputs)


def case_of(family: str, size: str, device: str, sets: list[str], plain: bool, peers: bool, compile_: bool) -> Case:
    """Return a case whose contenders are ours by kernel set, and who else is asked for."""
    case = _augment(size, device) if family == "augment" else FAMILIES[family].case(size, device)
    contenders = []
    for contender in case.contenders:
        if contender.name.startswith("scan-fast"):
            for kernels in sets:
                run = functools.partial(_with, family, kernels, contender.run)
                contenders.append(replace(contender, name=f"{contender.name} {kernels}", run=run))
        elif contender.name == COMPILED:
            contenders += [contender] if compile_ else []
        elif plain if contender.name in PLAIN else peers:
            contenders.append(contender)
    return replace(case, contenders=contenders)


def _kernels_of(case: Case, device: str) -> list[list[str]]:
    """Return, per contender, which of our kernels it runs; a set may leave a size to the portable kernels."""
    inputs = case.inputs(0)
    found = []
    for contender in case.contenders:
        with trace_launches() as ran, contender.settings():
            if contender.name.startswith("scan-fast") and not contender.skipped:
                with contextlib.suppress(Exception):  # measured before, so that its failure is known
                    contender.run(*inputs)
        found.append(ran or [device])
    return found


def _plan(sets: list[tuple[str, str]], more: bool, quick: bool) -> Iterator[tuple[str, str, list[str]]]:
    """Yield family, size and kernel sets in the order of what matters."""
    chosen: dict[str, list[str]] = {}
    for family, kernels in sets:
        chosen.setdefault(family, []).append(kernels)
    for place in range(2, 4) if more else range(2):
        for family, kernel_sets in chosen.items():
            small = ("20x16x16", "3x20x24") if family == "augment" else FAMILIES[family].quick_sizes
            sizes = small if quick else SIZES[family]
            if place < len(sizes):
                yield family, sizes[place], kernel_sets


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.timings", description=__doc__)
    parser.add_argument("--stage", default="timings")
    parser.add_argument("--sets", nargs="+", type=_sets, default=list(SETS), metavar="FAMILY:KERNELS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="a rehearsal, not a result")
    parser.add_argument("--more", action="store_true", help="further sizes instead of the first two")
    parser.add_argument("--peers", action="store_true", help="other libraries instead of PyTorch")
    parser.add_argument("--seconds", type=float, default=60.0, help="no case begins later than this")
    options = parser.parse_args()
    begin = time.perf_counter()
    if not native.is_available():
        raise SystemExit(f"the compiled module cannot be loaded: {native.load_error}")
    about = {"stage": options.stage, "family": "", "kernels": ""}
    ceilings = measure_ceilings(options.device, quick=options.quick)
    emit({"ceilings": ceilings, **about})
    effort = harness.QUICK if options.quick else Effort(rounds=9, case_seconds=1.5, least_rounds=3)
    for family, size, kernel_sets in _plan(options.sets, options.more, options.quick):
        left = options.seconds - (time.perf_counter() - begin)
        if left < 0:
            raise SystemExit(f"the time is up before {family} {size}")
        about = {"stage": options.stage, "family": family, "kernels": kernel_sets[-1]}
        emit({"begin": size, **about})
        compile_ = not options.peers and left > (0 if options.quick else COMPILE_SECONDS) and family != "augment"
        case = case_of(family, size, options.device, kernel_sets, not options.peers, options.peers, compile_)
        results = harness.measure(case, options.device, effort, ceilings)
        if not options.peers and not compile_ and family != "augment":
            results.append({"name": COMPILED, "skipped": "no time left to compile"})
        for result, ran in zip(results, _kernels_of(case, options.device), strict=False):
            result["ran"] = ran
        for kernels in kernel_sets:
            ours = [r for r in results if r["name"].startswith("scan-fast") and r["name"].endswith(kernels)]
            problem = "; ".join(f"{r['name']}: {r['failed']}" for r in ours if "failed" in r)
            ran = sorted({name for r in ours for name in r["ran"]})
            emit({**about, "kernels": kernels, "case": size, "passed": not problem, "problem": problem, "ran": ran})
        emit({"timing": size, "contenders": results, **about})
        if options.device == "cuda":
            torch.cuda.empty_cache()
    for family, kernels in options.sets:
        emit({"done": True, "stage": options.stage, "family": family, "kernels": kernels})


if __name__ == "__main__":
    main()
