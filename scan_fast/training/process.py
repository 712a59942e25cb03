"""Thread count and malloc settings of the process."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import distributed

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# The values to which glibc raises its own thresholds when large blocks are freed. Set values no longer adapt.
_DEFAULTS = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 << 20, _M_TRIM_THRESHOLD: 64 << 20, _M_TOP_PAD: 128 << 10}
_KEEPING = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 << 20}


def set_threads(wanted: int | None) -> None:
    """Use ``wanted`` threads, or at most as many as this process has cores.

    torch respects OMP_NUM_THREADS and the affinity mask, but not the CPU share of a container. More threads than that
    wait for each other. The processes of a run on one machine share its cores: torchrun gives each one thread if
    OMP_NUM_THREADS is not set.
    """
    limit = core_limit(Path("/sys/fs/cgroup"))
    local = distributed.current().local_world
    if wanted is not None:
        torch.set_num_threads(wanted)
    elif local > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, min(cores, limit or cores) // local))
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
    """Keep freed memory in the process, because the next step needs as much again.

    By default glibc returns every large block to the system and gets it back page by page, zeroed, in each operation.
    On the CPU that is up to a fifth of a training step. Without glibc, do nothing.
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
