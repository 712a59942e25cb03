"""Measures several implementations of one operation side by side, in one process.

- Before anything is timed, every contender's result is compared with a float64 reference; a wrong one is not timed.
- Every round runs every contender once, starting with another one each time, so that a slow moment of the machine or
  a falling clock affects all of them. The figures are the median and the 10th and 90th percentile over the rounds.
- CPU: wall clock around enough calls to fill ``sample_seconds``. CUDA: ``seconds`` is the device time per call, from
  replays of a CUDA graph; ``call_seconds`` is the time of ordinary back-to-back calls, which for small inputs is
  the time Python needs to launch them. Contenders that wait for the device cannot be captured and have the latter only.
- Calls rotate over several sets of inputs; on CUDA they exceed the second-level cache together.
- The limit is the time that the machine needs for the unavoidable arithmetic or traffic at rates measured in the same
  process, see :mod:`benchmarks.ceilings`.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .ceilings import Work, limit

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    Attributes:
        name: what the tables call it.
        run: maps inputs to outputs (of a loss: the loss, then the gradients).
        tolerance: the largest accepted error against the reference.
        work: the unavoidable work at this contender's precision; None for no limit.
        precision: torch's float32 matrix product precision while it runs.
        reference: replaces the case's reference for a contender that computes something related.
        capturable: whether a CUDA graph can hold it.
        compiles: whether the first call at a size compiles something.
        skipped: why it cannot run here; empty if it can.
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
    """One size: its inputs by seed, the float64 result, and the contenders."""

    name: str
    inputs: Callable[[int], Tensors]
    reference: Callable[..., Tensors]
    contenders: Sequence[Contender]
    error: Callable[[Tensors, Tensors], float] = field(default=lambda ours, exact: relative_error(ours, exact))


@dataclass(frozen=True)
class Effort:
    """Effort of a measurement: rounds, length of a sample, and the time after which ``least_rounds`` are enough."""

    rounds: int = 15
    sample_seconds: float = 0.02
    case_seconds: float = 60.0
    least_rounds: int = 5


QUICK = Effort(rounds=3, sample_seconds=0.002, case_seconds=5.0, least_rounds=2)


def relative_error(ours: Tensors, exact: Tensors) -> float:
    """Return the largest ``|ours - exact| / |exact|`` (Euclidean) over the outputs.

    The error is absolute if the exact output is zero, and infinite if a value is not finite.
    """
    if len(ours) != len(exact):
        raise ValueError(f"expected {len(exact)} outputs, got {len(ours)}")
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        if a.shape != b.shape:
            raise ValueError(f"expected an output of shape {tuple(b.shape)}, got {tuple(a.shape)}")
        a, b = a.detach().double(), b.detach().double().to(a.device)
        if not bool(a.isfinite().all()):
            return float("inf")
        error, scale = float((a - b).norm()), float(b.norm())
        worst = max(worst, error / scale if scale > 0 else error)
    return worst


def training_step(loss_of: Callable[..., Tensor]) -> Callable[..., Tensors]:
    """Return the call that computes a loss and its gradients with respect to the inputs that require them."""

    def run(*inputs: Tensor) -> Tensors:
        loss = loss_of(*inputs)
        return (loss.detach(), *torch.autograd.grad(loss, [x for x in inputs if x.requires_grad]))

    return run


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
            # A peer may fail for want of memory or a compiler; the others are still worth measuring.
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
