"""Runs the self-tests of the kernels: fixed inputs, small and odd shapes, compared with the references.

They decide whether a GPU on which nobody has checked the kernels may use them (:mod:`scan_fast.ops.trust`), so they
are short: exact results are computed on the CPU, in float64, and the device runs nothing but the kernels under test,
copies, and the filling of memory with NaN. A kernel may err at most twice as much as plain PyTorch in the same
precision, plus a few units in the last place, in norm and in each element; neighbours and views must be right in every
bit. The long way through the rings of the sm_90a kernels, too slow for full references, is covered by problems of 6,144
rows whose answer is known from a few rows each. The cases of each family are in :mod:`scan_fast.ops.self_tests`.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ..threads import one_thread
from . import native
from .self_tests.comparison import Finding


@dataclass(frozen=True)
class Result:
    """Result of a self-test.

    Attributes:
        passed: whether the error of every case is allowed.
        reason: the first case whose error is not, in words; empty if none.
        worst: the largest error of a case as a share of what is allowed.
        milliseconds: of the whole test.
    """

    passed: bool
    reason: str
    worst: float
    milliseconds: float


def run(family: str, kernels: str, device: torch.device) -> Result:
    """Test the kernels of a family on a device.

    Args:
        family: the name of one of :data:`scan_fast.ops.families.GPU_FAMILIES`.
        kernels: ``"portable"`` or ``"sm90"``; on the CPU both mean its kernels.
        device: device to test; the caller must have waited for its own work there.

    Returns:
        the result. Exceptions of the kernels are not caught.
    """
    return _in_a_thread(lambda: _run(family, kernels, device))


def findings_of(family: str) -> Callable[[torch.device], Iterator[Finding]]:
    """Return the function that yields the cases of a family and their errors, from its self_tests module."""
    findings: Callable[[torch.device], Iterator[Finding]]
    findings = importlib.import_module(f".self_tests.{family}", __package__).findings
    return findings


def _run(family: str, kernels: str, device: torch.device) -> Result:
    findings = findings_of(family)
    begin = time.perf_counter()
    worst, reason = 0.0, ""
    with _kernel_set(family, kernels, device), _full_precision(), one_thread():
        for case, error, allowed in findings(device):
            share = error / allowed if allowed > 0 else math.inf if error > 0 else 0.0
            if not error <= allowed:
                reason = reason or f"{case}: error {error:.1e}, allowed {allowed:.1e}"
                share = max(share, 1.0) if share == share else math.inf
            worst = max(worst, share)
    return Result(not reason, reason, worst, 1000 * (time.perf_counter() - begin))


def _in_a_thread(work: Callable[[], Result]) -> Result:
    """Run in a new thread and wait: PyTorch keeps much state of the caller per thread.

    Examples are inference mode, autocast, a default device, a functorch transform, a compiler's fake tensors, the
    stream.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="scan_fast self-test", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _kernel_set(family: str, kernels: str, device: torch.device) -> Iterator[None]:
    """Make a family use its portable kernels or those for sm_90a, on the device."""
    before = native.takes_sm90(family)
    if device.type != "cuda":
        yield
        return
    native.take_sm90(family, kernels == "sm90")
    try:
        with torch.cuda.device(device):
            yield
    finally:
        native.take_sm90(family, before)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Compute float32 products in full float32, whatever the user's setting; 16-bit inputs test the other products."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the settings that came with fp32_precision are in use
        legacy = None
    if legacy == "medium":
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("medium")
    elif legacy is None and matmul.fp32_precision == "bf16":
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "bf16"
    else:
        yield
