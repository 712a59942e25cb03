"""Peak memory of one contender beyond its inputs and outputs.

CUDA: the allocator's peak, in the measuring process. CPU: a separate process makes the inputs, runs the contender at a
small size (which loads code and starts threads), resets the system's high-water mark of resident memory, runs it once
at full size and reads the mark. That counts allocations of native code and of PyTorch, to within a few hundred
kilobytes.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .family import Family
    from .harness import Case, Contender

ROOT = Path(__file__).resolve().parents[1]


def peak_beyond(family: str, size: str, contender: str, device: str) -> int | None:
    """Return bytes; None if the system does not tell (CPU: anything but Linux) or the run fails."""
    if device == "cuda":
        return _cuda_peak(family, size, contender)
    if sys.platform != "linux":
        return None
    command = [sys.executable, "-m", "benchmarks.memory", family, size, contender]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    lines = finished.stdout.strip().splitlines()
    return json.loads(lines[-1])["bytes"] if finished.returncode == 0 and lines else None


def _load(name: str) -> Family:
    from . import family  # which imports this module

    return family.load(name)


def _find(family: str, size: str, contender: str, device: str) -> tuple[Case, Contender]:
    case = _load(family).case(size, device)
    return case, next(c for c in case.contenders if c.name == contender)


def _bytes(tensors: tuple[torch.Tensor, ...]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cuda_peak(family: str, size: str, contender: str) -> int:
    case, chosen = _find(family, size, contender, "cuda")
    inputs = case.inputs(0)
    with chosen.settings():
        chosen.run(*inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = chosen.run(*inputs)
        torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated()) - before - _bytes(outputs)


def resident_memory(field: str) -> int:
    """Return a figure of this process from Linux in bytes: VmRSS (now), or VmHWM (the peak since `reset_peak`)."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match, field
    return int(match[1]) * 1024


def reset_peak() -> int:
    """Reset the peak of resident memory to what is in use, and return that in bytes."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # free pages that malloc kept would hide an allocation
    Path("/proc/self/clear_refs").write_text("5")
    return resident_memory("VmRSS")


def _cpu_peak(family: str, size: str, contender: str) -> int:
    small_case, small = _find(family, _load(family).quick_sizes[0], contender, "cpu")
    with small.settings():
        small.run(*small_case.inputs(0))
    case, chosen = _find(family, size, contender, "cpu")
    inputs = case.inputs(0)
    if chosen.compiles:
        with chosen.settings():
            chosen.run(*inputs)  # the compiler's memory does not count
    before = reset_peak()
    with chosen.settings():
        outputs = chosen.run(*inputs)
    return max(0, resident_memory("VmHWM") - before - _bytes(outputs))


if __name__ == "__main__":
    print(json.dumps({"bytes": _cpu_peak(*sys.argv[1:4])}))
