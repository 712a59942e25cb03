"""Timings by pytest-benchmark, left out by default: ``pytest tests/benchmarks/test_regressions.py --benchmark-only``.

``--benchmark-autosave`` keeps a result, ``--benchmark-compare --benchmark-compare-fail=median:20%`` holds the next one
against it. Results are compared with float64 first. For comparisons with peers see ``python -m benchmarks.NAME``.
"""

from typing import Any

import pytest
import torch

from benchmarks import batch_norm, convolution, neighbors, nt_xent, scan_loss, self_label
from scan_fast.ops import native

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SIZES = [
    (nt_xent, "1024x128"),
    (nt_xent, "4096x128"),
    (scan_loss, "1024x10"),
    (scan_loss, "10x1024x100"),
    (self_label, "1000x10"),
    (self_label, "1024x1000"),
    (neighbors, "5000x128x20"),
    (batch_norm, "128x64x32x32-bfloat16-residual"),
    (convolution, "128x128x128x16x3x1"),
]


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("module", "size"), SIZES, ids=lambda value: getattr(value, "__name__", value))
def test_speed(benchmark: Any, module: Any, size: str, device: str) -> None:
    case = module.FAMILY.case(size, device)
    ours = next(contender for contender in case.contenders if contender.name == "scan-fast")
    if ours.skipped:
        pytest.skip(ours.skipped)
    inputs = case.inputs(0)
    assert case.error(ours.run(*inputs), case.reference(*inputs)) <= ours.tolerance

    def run() -> None:
        ours.run(*inputs)
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark(run)
