"""Checks of the compiled kernels on a device: ``python -m tools.gpu.checks CHECK --sets FAMILY:KERNELS ...``.

``accuracy``: fresh inputs (the seed is printed) in freed memory poisoned with NaN, so that an element that is never
written shows; the case judges the results (:mod:`tools.gpu.cases`). ``repeat``: the same call gives the same bits.
``graph``: a CUDA graph of a call, replayed on other inputs, gives what the call gives (on the CPU, which has no graphs,
the call itself is repeated). ``call``: every operator once, and nothing else, for compute-sanitizer.

Prints JSON lines: ``{"begin": ...}`` before a case, so that a hang has a name, the case's result after it, and
``{"done": ...}`` when a family's kernel set is through. A case whose kernels were not those asked for has failed.
It needs torch alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from scan_fast.ops import native
from scan_fast.ops.tracing import trace_launches

from .cases import SIZES, Call, Case, Tensors, cases_of, exempt
from .process import SETS, emit, first_line, kernel_set, prefer

Outcome = tuple[str, list[str]]
"""The problem, "" if there is none, and the kernels that ran."""


# ---- the checks ----------------------------------------------------------------------------------------------------


def accuracy(case: Case, device: str, seed: int) -> Outcome:
    """Judge the results of a call in poisoned memory."""
    inputs = case.inputs(seed, device)
    problem = case.judge(inputs)
    poison(device)
    with trace_launches() as ran:
        found = case.call(*inputs)
    return problem(found), ran


def repeat(case: Case, device: str, seed: int) -> Outcome:
    """Call again on the same inputs, in poisoned memory."""
    inputs = case.inputs(seed, device)
    with trace_launches() as ran:
        first = case.call(*inputs)
        for _ in range(3):
            poison(device)
            if not _same(first, case.call(*inputs)):
                return "the same call gave other bits", ran
    return "", ran


def graph(case: Case, device: str, seed: int) -> Outcome:
    """Record a call as a CUDA graph and replay it on other inputs."""
    first, second = case.inputs(seed, device), case.inputs(seed + 1, device)
    with trace_launches() as ran:
        expected = tuple(x.clone() for x in case.call(*second))
    inputs = tuple(x.clone() for x in first)
    try:
        replay, outputs = _recorded(case.call, inputs, device)
    except RuntimeError as error:
        return f"no graph: {first_line(error)}", ran
    for x, value in zip(inputs, second, strict=True):
        x.copy_(value)
    for x in outputs():
        x.fill_(-1)
    replay()
    return "" if _same(outputs(), expected) else "a replay on other inputs does not give what the call gives", ran


def call(case: Case, device: str, seed: int) -> Outcome:
    """Call once; compute-sanitizer prints what is wrong."""
    inputs = case.inputs(seed, device)
    with trace_launches() as ran:
        case.call(*inputs)
    return "", ran


CHECKS: dict[str, Callable[[Case, str, int], Outcome]] = {
    "accuracy": accuracy,
    "repeat": repeat,
    "graph": graph,
    "call": call,
}


def poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations get: CUDA's allocator keeps freed blocks by size."""
    sizes = 6 * [64, 4096]
    if device == "cuda":
        # Nothing else may be kept, or a block with the numbers of an earlier call would be handed out.
        torch.cuda.empty_cache()
        inside = [block for segment in torch.cuda.memory_snapshot() for block in segment["blocks"]]
        sizes = [block["size"] // 4 for block in inside if block["state"] == "inactive"]  # beside what is in use
        sizes += 6 * [64, 4096, 1 << 18, 1 << 22, 1 << 25]
    blocks = [torch.full((size,), float("nan"), device=device) for size in sizes]
    del blocks


def _same(first: Tensors, second: Tensors) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _recorded(call: Call, inputs: Tensors, device: str) -> tuple[Callable[[], None], Callable[[], Tensors]]:
    """Record a call on these inputs; return the function that repeats it, and the one that returns its outputs."""
    if device == "cpu":
        kept = [call(*inputs)]

        def run() -> None:
            kept[0] = call(*inputs)

        return run, lambda: kept[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        outputs = call(*inputs)

    def replay() -> None:
        recording.replay()
        torch.cuda.synchronize()

    return replay, lambda: outputs


# ---- running them --------------------------------------------------------------------------------------------------


def bodies(
    check: str, family: str, kernels: str, device: str, seed: int, size: str
) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    """Yield the cases of a family that a check takes: label, and what runs the check on it."""
    for case in cases_of(family, size, kernels):
        if check in case.checks:
            yield case.label, partial(CHECKS[check], case, device, seed)


def wrong_kernels(kernels: str, ran: list[str], device: str) -> str:
    """Return a complaint if other kernels ran than were asked for."""
    if device == "cpu":
        return ""
    hopper = [name for name in ran if "sm90" in name]
    if not ran:
        return "no kernel of this package was launched"
    if kernels == "sm90" and not hopper:
        return f"the portable kernels ran: {', '.join(ran)}"
    if kernels == "portable" and hopper:
        return f"kernels for sm_90a ran: {', '.join(hopper)}"
    return ""


def run_case(about: dict[str, str], kernels: str, device: str, body: Callable[[], Outcome]) -> dict[str, Any]:
    """Run one case and return its result; an exception is its failure."""
    begin = time.perf_counter()
    try:
        problem, ran = body()
        if device == "cuda":
            torch.cuda.synchronize()
        problem = problem or wrong_kernels(kernels, ran, device)
    except Exception as error:
        problem, ran = f"{type(error).__name__}: {first_line(error)}", []
    seconds = round(time.perf_counter() - begin, 3)
    return about | {"passed": not problem, "problem": problem, "ran": ran or [device], "seconds": seconds}


def _is_lost(device: str) -> bool:
    """Return whether a failed kernel has made this process's GPU unusable."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.checks", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--stage", help="the stage that the lines belong to; default: the check")
    parser.add_argument("--sets", nargs="+", type=kernel_set, default=list(SETS), metavar="FAMILY:KERNELS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    options = parser.parse_args()
    stage, device = options.stage or options.check, options.device
    if not native.is_available():
        raise SystemExit(f"the compiled module cannot be loaded: {native.load_error}")
    if device == "cuda":
        torch.ones(1, device=device).add_(1).item()  # a failure here is not one of our kernels
    emit({"started": stage})
    for family, kernels in options.sets:
        prefer(family, kernels)
        about = {"stage": stage, "family": family, "kernels": kernels}
        if reason := exempt(family, options.check):
            emit({"exempt": reason, **about})
        for label, body in bodies(options.check, family, kernels, device, options.seed, options.size):
            emit({"begin": label, **about})
            result = run_case(about | {"case": label}, kernels, device, body)
            emit(result | {"seed": options.seed})
            if not result["passed"] and _is_lost(device):
                raise SystemExit(f"{family} {kernels}, {label}: {result['problem']}; this process has lost its GPU")
        emit({"done": True, **about})


if __name__ == "__main__":
    main()
