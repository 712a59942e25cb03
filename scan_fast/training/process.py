"""What a process asks of its machine: threads that fit the cores it may use, and memory that stays with it."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# The thresholds are those to which glibc raises its own as large blocks come and go; once set, they no longer move.
_DEFAULTS = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10}
_KEEPING = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}


def set_threads(wanted: int | None) -> None:
    """Use ``wanted`` threads, or at most as many as there are cores for this process.

    OMP_NUM_THREADS and the affinity mask have been heard by torch; the share of a container has not, and more threads
    than that make each other wait.
    """
    limit = core_limit(Path("/sys/fs/cgroup"))
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif limit is not None and limit < torch.get_num_threads():
        torch.set_num_threads(limit)


def core_limit(cgroup: Path) -> int | None:
    """Return the cores, rounded up, that a control group (version 2 or 1) grants its processes; None for no limit."""
    try:
        if (cgroup / "cpu.max").is_file():
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return max(1, -(-int(quota) // int(period))) if int(quota) > 0 else None
    except (OSError, ValueError):  # "max", or no control groups
        return None


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep freed memory in the process for the time, for the next step needs as much again.

    By default glibc returns every large block to the system at once and takes it back page by page, zeroed, in each
    operation: on the CPU that is up to a fifth of a training step. Other systems and libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if platform.libc_ver()[0] == "glibc" else None
    if mallopt is None:
        yield
        return
    for option, value in _KEEPING.items():
        mallopt(option, value)
    try:
        yield
    finally:
        for option, value in _DEFAULTS.items():
            mallopt(option, value)
        ctypes.CDLL(None).malloc_trim(0)
