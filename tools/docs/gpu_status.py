"""docs/gpu-status.md, from the records of scan_fast/gpu_status.json; :mod:`tools.gpu.status` writes both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu-status.md"
INTRODUCTION = """# What has run on a GPU

The test suite compiles every CUDA kernel for all supported architectures and runs it on the host, thread by thread
(`csrc/common/device.h`). That does not replace a GPU. `python -m tools.gpu.status` writes this page from
`scan_fast/gpu_status.json`: the kernels that have passed `tools/gpu_suite` on a GPU, and in which form.

- **verified**: this very source (comments aside) passed;
- **failed**: this very source ran, and something was wrong: see the last column;
- **partly run**: this very source ran without a failure, but some of the checks that it must pass did not finish;
- **unverified**: an earlier form passed, the source has changed since;
- **never run**: compiled, and run on the host only. A kernel that is not listed has never run, either.

| kernel | status | on | date | commit | source hash | what failed, or is missing |
|---|---|---|---|---|---|---|
"""
ENDING = """
## Predictions

The kernels have changed since the measurement on an H200 (`benchmarks/results/kernels-h200.json`). What their changes
should bring was written down before any measurement, and none of the column "predicted" has been measured. It follows
from bytes, flops, registers and waves of blocks, which the headers of the sources give; latencies are guesses. "Limit"
is the longest of products, memory and exponentials at the measured peak rates; for a search, of all products, without
symmetry.

| kernels, size | measured before | predicted | share of limit | what changes |
|---|---:|---:|---:|---|
| nt_xent 16-bit, 1024x128 | 36 us | 18 us | 5 % | 32-bit indices, rows in registers, overlapping launches |
| nt_xent 16-bit, 8192x64 | | 45 us | 60 % | the same; a quarter of the forward exponentials by polynomials |
| nt_xent 16-bit, 8192x128 | 122 us | 96 us | 59 % | the same |
| nt_xent 16-bit, 65536x128 | | 4.0 ms | 85 % | |
| nt_xent 16-bit, 8192x512 | | 330 us | 67 % | kernels for sm_90a up to 1,024 dimensions |
| nt_xent float32, 1024x128 | 42 us | 23 us | | as in 16 bits |
| nt_xent float32, 8192x128 | 223 us | 200 us | 87 % | |
| nt_xent float32, 8192x512 | | 1.25 ms | 53 % | |
| neighbors 50000x512, k = 20 | 9.6 ms | 4.5 ms | 75 % | queries in shared memory; lists without loads |
| neighbors 20000x512, k = 20 | 4.1 ms | 1.1 ms | 50 % | thresholds from the first tile; eight sums at a time |
| scan_loss 10x1024x1000 float32 | 106 us | 70 us | 80 % | grids of one wave; sums in a second kernel |
| scan_loss 1024x10 | 11 us | 6 us | | no memset, no ticket |
| self_label 1024x1000 float32 | 24 us | 10 us | 40 % | no atomics on global memory, no memset |
| self_label 1000x10 | 16 us | 7 us | | |
| augment 1024x32x32 | 123 us | 30 us | 7 % | four warps per image, two passes of the resize, no divisions |

## To verify on a machine with an NVIDIA GPU

With nvcc, CMake, ninja and pybind11 beside torch:

    tools/gpu_suite gpu_suite_out
    python -m tools.gpu.status --update gpu_suite_out/summary.json

On a machine that is rented by the minute, with torch 2.11 for CUDA 13 and Python 3.12, bring the compiled module along.
PYTHON is an interpreter of that version with that torch, pybind11, ninja and CMake. Here:

    tools/gpu_build --python PYTHON --peers --data cifar10-jpeg.tar.xz

There, with the working tree and `build/gpu_carry` (results go to `$OUT` if it is set):

    SCAN_FAST_COMMIT=COMMIT tools/gpu_suite --carried build/gpu_carry --budget 270

After reading what failed, there again, and then here:

    SCAN_FAST_COMMIT=COMMIT tools/gpu_suite --carried build/gpu_carry --budget 120 --only accuracy,nt_xent:sm90
    python -m tools.gpu.status --update first/summary.json second/summary.json

Of several summaries the later result of a case counts, as long as the source of the kernel is the same
(`tools/gpu_suite FOLDER --merge SUMMARY ...` writes such a union without touching the record).

The rest of the time may go to the `fast` CIFAR-10 preset ([recipes.md](recipes.md)):

    SCAN_FAST_COMMIT=COMMIT tools/gpu_run --minutes MINUTES

The suite needs torch alone. Its stages run every kernel once, at sizes at which the rings of the `_sm90` kernels go
round; compare with float64 on fresh inputs in poisoned memory; measure times; repeat calls; capture CUDA graphs;
profile a SimCLR step; and run compute-sanitizer. If time is left, the other tools of compute-sanitizer, other libraries
and more sizes follow. Each stage runs in processes with limits; a kernel that hangs or crashes is left out afterwards.
`summary.json` is rewritten with every result, so an interrupted run leaves what it found; the times and the step leave
enough seconds to the later stages that decide about a kernel. If compute-sanitizer does not work, a kernel is verified
without it, and the summary says so. `--rehearse` runs the same stages on the CPU. After a change of a verified kernel,
`python -m tools.gpu.status --refresh` records that it is unverified; the tests fail until that or another `--update`.

Sources that end in `_sm90` hold kernels for compute capability 9.0, beside the portable ones of their family. A kernel
whose very source is verified on a model of GPU is used there without a test. On any other GPU a self-test at its first
use decides between it and plain PyTorch, warns once if it fails, and keeps its verdict in `~/.cache/scan-fast`
(`scan-fast info --check` runs all of them again). On GPUs of compute capability 9.0 both kernel sets of a family are
judged: the `_sm90` kernels run if both are right, the portable ones alone if only they are, plain PyTorch otherwise.
`SCAN_FAST_GPU_KERNELS=sm90` uses the `_sm90` kernels without a test, `SCAN_FAST_GPU_KERNELS=portable` never does.
"""


def render(records: dict[str, dict[str, Any]]) -> str:
    """Return the page."""
    rows = []
    for name, record in sorted(records.items()):
        about = record.get("latest") or record["passed"] or {}
        cells = [about.get("device", ""), about.get("date", ""), about.get("commit", "")[:12]]
        cells.append(f"`{about['sha256'][:12]}`" if about else "")
        cells.append(about.get("reason", "").replace("|", "/"))
        rows.append(f"| {name} | {record['status']} | {' | '.join(cells)} |\n")
    return INTRODUCTION + "".join(rows) + ENDING
