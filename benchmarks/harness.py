"""Measures several implementations of one operation side by side, in one process.

- Before anything is timed, every contender's result is compared with a float64 reference; a wrong one is not timed.
- Every round runs every contender once, starting with another one each time, so that a slow moment of the machine or
  a falling clock meets all of them. The figures are the median and the 10th and 90th percentile over the rounds.
- CPU: wall clock around enough calls to fill ``sample_seconds``. CUDA: ``seconds`` is the device time per call, from
  replays of a CUDA graph; ``call_seconds`` is the time of ordinary back-to-back calls, which for small inputs is
  the time Python needs to launch them. Contenders that wait for the device cannot be captured and have the latter only.
- Calls rotate over several sets of inputs; on CUDA they exceed the second-level cache together.
- Memory is the peak beyond inputs and outputs, see :mod:`benchmarks.memory`.
- The limit is the time the machine needs for the unavoidable arithmetic or traffic at rates measured in the same
  process, see :mod:`benchmarks.ceilings`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import memory
from .ceilings import Work, limit, measure_ceilings
from .environment import describe

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: what the tables call it.
        run: from inputs to outputs (for losses: the loss, then the gradients).
        tolerance: the largest accepted error against the reference.
        work: the unavoidable work at this contender's precision; None for no limit.
        precision: torch's float32 matrix product precision while it runs.
        reference: replaces the case's reference for a contender that computes something related.
        capturable: whether a CUDA graph can hold it.
        compiles: whether the first call at a size compiles something.
        skipped: why it cannot run here; empty where it can.
    """

    name: str
    run: Callable[..., Tensors]
    tolerance: float
    work: Work | None = None
    precision: str = "highest"
    reference: Callable[..., Tensors] | None = None
    capturable: bool = True
    compiles: bool = False
    skipped: str = ""

    @contextlib.contextmanager
    def settings(self) -> Iterator[None]:
        """Apply the contender's precision."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Case:
    """One size: its inputs by seed, the float64 result, and who competes."""

    name: str
    inputs: Callable[[int], Tensors]
    reference: Callable[..., Tensors]
    contenders: Sequence[Contender]
    error: Callable[[Tensors, Tensors], float] = field(default=lambda ours, exact: relative_error(ours, exact))


@dataclass(frozen=True)
class Family:
    """One operation: how to build a case from the text of a size, and the sizes by device."""

    name: str
    title: str
    case: Callable[[str, str], Case]
    sizes: dict[str, Sequence[str]]
    quick_sizes: Sequence[str]
    memory_sizes: dict[str, Sequence[str]]


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, the length of one sample, and when to stop early after ``least_rounds``."""

    rounds: int = 15
    sample_seconds: float = 0.02
    case_seconds: float = 60.0
    least_rounds: int = 5


QUICK = Effort(rounds=3, sample_seconds=0.002, case_seconds=5.0, least_rounds=2)


def relative_error(ours: Tensors, exact: Tensors) -> float:
    """Return the largest ``|ours - exact| / |exact|`` (Euclidean) over the outputs; infinity for a non-finite value."""
    if len(ours) != len(exact):
        raise ValueError(f"expected {len(exact)} outputs, got {len(ours)}")
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"expected an output of shape {tuple(b.shape)}, got {tuple(a.shape)}")
        a, b = a.detach().double(), b.detach().double().to(a.device)
        if not bool(a.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a - b).norm() / b.norm().clamp_min(1e-30)))
    return worst


# ---- timing ------------------------------------------------------------------------------------------------------


class _Timer:
    """Samples one contender on one device."""

    def __init__(self, contender: Contender, sets: Sequence[Tensors], device: str, effort: Effort) -> None:
        self.contender, self.sets, self.device, self.effort = contender, sets, device, effort
        self.samples: list[float] = []
        self.call_samples: list[float] = []
        self.graph: Any = None
        with contender.settings():
            for inputs in sets[:3]:
                contender.run(*inputs)
            self._synchronize()
            if device == "cuda" and contender.capturable:
                self._capture()
            self.calls = self._repeats(self._time_calls)
            self.replays = self._repeats(self._time_replays) if self.graph is not None else 0

    def sample(self) -> None:
        """Take one sample of each kind."""
        with self.contender.settings():
            calls = self._time_calls(self.calls) / self.calls
            if self.graph is None:
                self.samples.append(calls)
            else:
                self.call_samples.append(calls)
                self.samples.append(self._time_replays(self.replays) / (self.replays * len(self.sets)))

    def _repeats(self, timed: Callable[[int], float]) -> int:
        timed(1)
        once = max(timed(1), 1e-7)
        return max(1, round(self.effort.sample_seconds / once))

    def _synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _capture(self) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for inputs in self.sets[:3]:
                self.contender.run(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for inputs in self.sets:
                    self.contender.run(*inputs)
        except RuntimeError as error:
            print(f"  {self.contender.name}: no CUDA graph ({_first_line(error)}); timed by ordinary calls")
            torch.cuda.synchronize()
            return
        self.graph = graph

    def _time_calls(self, repeats: int) -> float:
        run, sets = self.contender.run, self.sets
        if self.device == "cpu":
            begin = time.perf_counter()
            for i in range(repeats):
                run(*sets[i % len(sets)])
            return time.perf_counter() - begin

        def calls() -> None:
            for i in range(repeats):
                run(*sets[i % len(sets)])

        return self._between_events(calls)

    def _time_replays(self, repeats: int) -> float:
        def replay() -> None:
            for _ in range(repeats):
                self.graph.replay()

        return self._between_events(replay)

    def _between_events(self, body: Callable[[], None]) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        body()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def input_sets(case: Case, device: str) -> list[Tensors]:
    """Draw enough inputs to exceed twice the GPU's second-level cache (3 to 64 sets; 3 on the CPU)."""
    first = case.inputs(0)
    count = 3
    if device == "cuda":
        cache = torch.cuda.get_device_properties(first[0].device).L2_cache_size
        size = sum(tensor.numel() * tensor.element_size() for tensor in first)
        count = min(64, max(3, -(-2 * cache // size)))
    return [first, *(case.inputs(seed) for seed in range(1, count))]


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def measure(case: Case, device: str, effort: Effort, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """Check and time all contenders of a case; one plain dictionary each, see the module's docstring."""
    sets = input_sets(case, device)
    exact = case.reference(*sets[0])
    results: list[dict[str, Any]] = []
    running: list[tuple[_Timer, dict[str, Any]]] = []
    for contender in case.contenders:
        result: dict[str, Any] = {"name": contender.name}
        results.append(result)
        if contender.skipped:
            result["skipped"] = contender.skipped
            continue
        try:
            with contender.settings():
                outputs = contender.run(*sets[0])
            expected = exact if contender.reference is None else contender.reference(*sets[0])
            result["error"] = case.error(outputs, expected)
            del outputs
            if not result["error"] <= contender.tolerance:
                result["failed"] = f"wrong: error {result['error']:.1e}, allowed {contender.tolerance:.0e}"
                continue
            running.append((_Timer(contender, sets, device, effort), result))
        except Exception as error:
            # A peer may fail in ways of its own (memory, a missing compiler); the others are still worth measuring.
            result["failed"] = f"{type(error).__name__}: {_first_line(error)}"
    _run_rounds([timer for timer, _ in running], effort)
    for timer, result in running:
        result |= _statistics(timer.samples, "seconds")
        if timer.call_samples:
            result |= _statistics(timer.call_samples, "call_seconds")
        if timer.contender.work is not None:
            result["limit_seconds"], result["bound"] = limit(timer.contender.work, ceilings)
            result["of_limit"] = result["limit_seconds"] / result["seconds"]
    return results


def _run_rounds(timers: list[_Timer], effort: Effort) -> None:
    begin = time.perf_counter()
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(effort.rounds):
            if done >= effort.least_rounds and time.perf_counter() - begin > effort.case_seconds:
                break
            for i in range(len(timers)):
                timers[(i + done) % len(timers)].sample()
    finally:
        if collecting:
            gc.enable()


def _statistics(samples: list[float], name: str) -> dict[str, Any]:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return {
        name: statistics.median(ordered),
        f"{name}_p10": ordered[round(0.1 * last)],
        f"{name}_p90": ordered[round(0.9 * last)],
        "rounds": len(ordered),
    }


# ---- command line ------------------------------------------------------------------------------------------------


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
        family: what to measure.
        device: ``"cpu"`` or ``"cuda"``.
        sizes: in the family's notation.
        effort: how long.
        contenders: names to keep; empty for all.
        memory_sizes: sizes at which peak memory is measured, too.
        file: where to write the result; written after every size, so that an interruption loses one size at most.
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
            case = Case(case.name, case.inputs, case.reference, kept, case.error)
        print(f"{family.title}, {case.name}")
        results = measure(case, device, effort, ceilings)
        if size in memory_sizes:
            for result in results:
                if "seconds" in result:
                    result["memory_bytes"] = memory.peak_beyond(family.name, size, result["name"], device)
        cases.append({"size": case.name, "contenders": results})
        print(table(results))
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(family_result, indent=2) + "\n")
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
    memory_sizes = (
        () if options.no_memory else family.quick_sizes[:1] if options.quick else family.memory_sizes[options.device]
    )
    run_family(family, options.device, sizes, effort, options.contenders, memory_sizes, options.json)
