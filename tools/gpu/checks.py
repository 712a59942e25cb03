"""Checks of the compiled kernels on a device: ``python -m tools.gpu.checks CHECK --sets FAMILY:KERNELS ...``.

``accuracy``: fresh inputs (the seed is printed) and freed memory poisoned with NaN, so that an element nobody writes
shows; against float64, a kernel may err at most twice as much as plain PyTorch in the same precision, plus a few units
in the last place; neighbours and views must be right in every bit. ``repeat``: the same call gives the same bits.
``graph``: a CUDA graph of a call, replayed on other inputs, gives what the call gives (on the CPU, which has no graphs,
the call itself is replayed); the views are not among them, because the host reads their recipes. ``call``: every
operator once, and nothing else, for compute-sanitizer.

Prints JSON lines: ``{"begin": ...}`` before a case, so that a hang has a name, the case's result after it, and
``{"done": ...}`` when a family's kernel set is through. A case whose kernels were not those asked for has failed.
It needs torch alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

import scan_fast
from scan_fast.ops import native
from scan_fast.ops.tracing import trace_launches

from .cases import (
    DTYPES,
    SETS,
    SIZES,
    VIEW_DTYPES,
    Call,
    GradientCase,
    NeighborCase,
    Tensors,
    ViewCase,
    gradient_cases,
    gradient_inputs,
    neighbor_cases,
    neighbor_inputs,
    view_cases,
    view_inputs,
    views,
)

_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
Body = Callable[[], tuple[str, list[str]]]
"""A case: returns what is wrong, "" if nothing, and the kernels that ran."""


def prefer(family: str, kernels: str) -> None:
    """Have a family take one of its kernel sets from now on."""
    native.take_sm90(family, kernels == "sm90")


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


def relative(ours: Tensors, exact: Tensors) -> float:
    """Return the largest relative error of several results; infinity if one is not finite."""
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        if not bool(a.isfinite().all()):
            return float("inf")
        scale = float(b.norm())
        worst = max(worst, float((a.double() - b).norm()) / scale if scale > 0 else float(a.double().norm()))
    return worst


def _slack(family: str, dtype: torch.dtype, device: str) -> int:
    """Units in the last place that a kernel may err besides twice what plain PyTorch does."""
    if dtype != torch.float32:
        # NT-Xent multiplies 16-bit inputs in 16 bits, where plain PyTorch multiplies them in float32.
        return 8 if family == "nt_xent" else 2
    if device == "cpu":
        return 2
    # Matrix units cut off sums instead of rounding them, times 1 / temperature; the fast exp2 errs by two units.
    return 64 if family == "nt_xent" else 16


def _same(first: Tensors, second: Tensors) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- the checks: each yields the cases of a family as (label, body) ------------------------------------------------


def _dtypes(size: str) -> tuple[torch.dtype, ...]:
    return DTYPES[:2] if size == "smoke" else DTYPES


def accuracy(family: str, kernels: str, device: str, seed: int, size: str) -> Iterator[tuple[str, Body]]:
    """Compare with float64, or bit by bit."""

    def gradient(case: GradientCase, dtype: torch.dtype) -> tuple[str, list[str]]:
        cpu = gradient_inputs(case, seed)
        inputs = (*(x.to(device, dtype) for x in cpu[:2]), cpu[2].to(device))
        exact = case.call_of("exact")(*(x.double() for x in inputs))
        plain = relative(case.call_of("reference")(*inputs), exact)
        poison(device)
        with trace_launches() as ran:
            ours = relative(case.call_of("native")(*inputs), exact)
        allowed = 2 * plain + _slack(family, dtype, device) * _ROUNDING[dtype]
        return "" if ours <= allowed else f"error {ours:.1e}, allowed {allowed:.1e}", ran

    def search(case: NeighborCase, with_queries: bool) -> tuple[str, list[str]]:
        x, queries = neighbor_inputs(case, seed)
        options: dict[str, Any] = {"metric": case.metric}
        poison(device)
        with trace_launches() as ran:
            found = scan_fast.topk_neighbors(
                x.to(device), case.k, queries=queries.to(device) if with_queries else None, **options, impl="native"
            )
        if with_queries or case.compared == case.rows:
            expected = scan_fast.topk_neighbors(
                x, case.k, queries=queries if with_queries else None, **options, impl="reference"
            )
            rows = torch.arange(len(expected[0]))
        else:
            # Some rows, among them the duplicates. The reference finds each row itself first or among its ties: leave
            # it out by its number.
            rows = torch.arange(0, case.rows, case.rows // case.compared)[: case.compared]
            rows = torch.cat([rows, case.rows // 2 + torch.arange(5)]).unique()
            more = scan_fast.topk_neighbors(x, case.k + 1, queries=x[rows], **options, impl="reference")
            # A row without neighbours (NaN) does not find itself either: then the last place is dropped.
            others = more[1] != rows[:, None]
            others[others.all(dim=1), -1] = False
            expected = (more[0][others].view(-1, case.k), more[1][others].view(-1, case.k))
        value, index = (y.cpu()[rows] for y in found)
        wrong = int((index != expected[1]).sum()) + int((value != expected[0]).sum())
        return f"{wrong} of {2 * index.numel()} values and indices differ" if wrong else "", ran

    def view(case: ViewCase, dtype: torch.dtype) -> tuple[str, list[str]]:
        images, recipes = view_inputs(case, seed)
        # Each image by itself on the CPU: what comes out depends neither on the device nor on the batch.
        alone = [views(images[i : i + 1], recipes[i : i + 1], case.side, dtype) for i in range(case.count)]
        poison(device)
        with trace_launches() as ran:
            together = views(images.to(device), recipes, case.side, dtype).cpu()
        wrong = int((together != torch.cat(alone)).sum())
        return f"{wrong} values differ from the CPU's" if wrong else "", ran

    for case in gradient_cases(size):
        for dtype in _dtypes(size):
            if case.family == family and case.runs_on(kernels, dtype):
                yield f"{case.label} {_name(dtype)}", lambda c=case, d=dtype: gradient(c, d)  # type: ignore[misc]
    if family == "neighbors":
        for search_case in neighbor_cases(size, kernels):
            yield search_case.label, lambda c=search_case: search(c, False)  # type: ignore[misc]
            if search_case.rows <= 5000:
                yield f"{search_case.label}, queries", lambda c=search_case: search(c, True)  # type: ignore[misc]
    if family == "augment":
        for view_case in view_cases(size):
            for dtype in VIEW_DTYPES:
                yield f"{view_case.label} {_name(dtype)}", lambda c=view_case, d=dtype: view(c, d)  # type: ignore[misc]


def _calls(family: str, kernels: str, device: str, size: str) -> Iterator[tuple[str, Call, Callable[[int], Tensors]]]:
    """Yield label, call and inputs by seed of what can be called twice."""
    for case in gradient_cases(size):
        for dtype in DTYPES[:2]:
            if case.family == family and case.runs_on(kernels, dtype):

                def inputs(seed: int, c: GradientCase = case, d: torch.dtype = dtype) -> Tensors:
                    first, second, upstream = gradient_inputs(c, seed)
                    return first.to(device, d), second.to(device, d), upstream.to(device)

                yield f"{case.label} {_name(dtype)}", case.call_of("native"), inputs
    for search_case in neighbor_cases(size, kernels) if family == "neighbors" else ():

        def search(x: torch.Tensor, c: NeighborCase = search_case) -> Tensors:
            return scan_fast.topk_neighbors(x, c.k, metric=c.metric, impl="native")

        yield search_case.label, search, lambda seed, c=search_case: (neighbor_inputs(c, seed)[0].to(device),)  # type: ignore[misc]


def repeat(family: str, kernels: str, device: str, seed: int, size: str) -> Iterator[tuple[str, Body]]:
    """Call again on the same inputs, in poisoned memory."""

    def again(call: Call, inputs_of: Callable[[int], Tensors]) -> tuple[str, list[str]]:
        inputs = inputs_of(seed)
        with trace_launches() as ran:
            first = call(*inputs)
            for _ in range(3):
                poison(device)
                if not _same(first, call(*inputs)):
                    return "the same call gave other bits", ran
        return "", ran

    for label, call, inputs_of in _calls(family, kernels, device, size):
        yield label, lambda c=call, i=inputs_of: again(c, i)  # type: ignore[misc]
    for case in view_cases(size) if family == "augment" else ():
        images, recipes = view_inputs(case, seed)

        def view(*_: Any, x: Any = images, r: Any = recipes, s: int = case.side) -> Tensors:
            return (views(x.to(device), r, s, torch.float32),)

        yield case.label, lambda c=view: again(c, lambda _: ())  # type: ignore[misc]


def graph(family: str, kernels: str, device: str, seed: int, size: str) -> Iterator[tuple[str, Body]]:
    """Record a call as a CUDA graph and replay it on other inputs."""

    def replayed(call: Call, inputs_of: Callable[[int], Tensors]) -> tuple[str, list[str]]:
        first, second = inputs_of(seed), inputs_of(seed + 1)
        with trace_launches() as ran:
            expected = tuple(x.clone() for x in call(*second))
        inputs = tuple(x.clone() for x in first)
        try:
            replay, outputs = _recorded(call, inputs, device)
        except RuntimeError as error:
            return f"no graph: {_first_line(error)}", ran
        for x, value in zip(inputs, second, strict=True):
            x.copy_(value)
        for x in outputs():
            x.fill_(-1)
        replay()
        return "" if _same(outputs(), expected) else "a replay on other inputs does not give what the call gives", ran

    for label, call, inputs_of in _calls(family, kernels, device, size):
        yield label, lambda c=call, i=inputs_of: replayed(c, i)  # type: ignore[misc]


def _recorded(call: Call, inputs: Tensors, device: str) -> tuple[Callable[[], None], Callable[[], Tensors]]:
    """Record a call on these inputs; return what runs it again and what gives its outputs."""
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


def call(family: str, kernels: str, device: str, seed: int, size: str) -> Iterator[tuple[str, Body]]:
    """Call once; what is wrong, the sanitizer says."""

    def once(function: Call, inputs_of: Callable[[int], Tensors]) -> tuple[str, list[str]]:
        inputs = inputs_of(seed)
        with trace_launches() as ran:
            function(*inputs)
        return "", ran

    for label, function, inputs_of in _calls(family, kernels, device, size):
        yield label, lambda c=function, i=inputs_of: once(c, i)  # type: ignore[misc]
    for case in view_cases(size) if family == "augment" else ():
        images, recipes = view_inputs(case, seed)

        def view(*_: Any, x: Any = images, r: Any = recipes, s: int = case.side) -> Tensors:
            return tuple(views(x.to(device), r, s, dtype) for dtype in VIEW_DTYPES)

        yield case.label, lambda c=view: once(c, lambda _: ())  # type: ignore[misc]


CHECKS = {"accuracy": accuracy, "repeat": repeat, "graph": graph, "call": call}


# ---- running them --------------------------------------------------------------------------------------------------


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


def run_case(about: dict[str, str], kernels: str, device: str, body: Body) -> dict[str, Any]:
    """Run one case and return its result; what it raises is its failure."""
    begin = time.perf_counter()
    try:
        problem, ran = body()
        if device == "cuda":
            torch.cuda.synchronize()
        problem = problem or wrong_kernels(kernels, ran, device)
    except Exception as error:
        problem, ran = f"{type(error).__name__}: {_first_line(error)}", []
    seconds = round(time.perf_counter() - begin, 3)
    return about | {"passed": not problem, "problem": problem, "ran": ran or [device], "seconds": seconds}


def emit(line: dict[str, Any]) -> None:
    """Print one object for the suite."""
    print(json.dumps(line), flush=True)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_lost(device: str) -> bool:
    """Whether a failed kernel took this process's GPU with it."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
    return False


def _sets(text: str) -> tuple[str, str]:
    family, _, kernels = text.partition(":")
    if (family, kernels) not in SETS:
        known = " ".join(":".join(pair) for pair in SETS)
        raise argparse.ArgumentTypeError(f"{text!r} is no kernel set; there are {known}")
    return family, kernels


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.checks", description=__doc__)
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--stage", help="what the lines say they belong to; default: the check")
    parser.add_argument("--sets", nargs="+", type=_sets, default=list(SETS), metavar="FAMILY:KERNELS")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    options = parser.parse_args()
    stage, device = options.stage or options.check, options.device
    if not native.is_available():
        raise SystemExit(f"the compiled module cannot be loaded: {native.load_error}")
    if device == "cuda":
        torch.ones(1, device=device).add_(1).item()  # what fails here is not a kernel of ours
    emit({"started": stage})
    for family, kernels in options.sets:
        prefer(family, kernels)
        about = {"stage": stage, "family": family, "kernels": kernels}
        for label, body in CHECKS[options.check](family, kernels, device, options.seed, options.size):
            emit({"begin": label, **about})
            result = run_case(about | {"case": label}, kernels, device, body)
            emit(result | {"seed": options.seed})
            if not result["passed"] and _is_lost(device):
                raise SystemExit(f"{family} {kernels}, {label}: {result['problem']}; this process has lost its GPU")
        emit({"done": True, **about})


if __name__ == "__main__":
    main()
