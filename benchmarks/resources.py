"""Measures what this process holds: memory, open files, threads, children, temporary files. Linux only."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

_SELF = Path("/proc/self")
_M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
BLOCKS = 20
"""Rounds next to each other are averaged in so many blocks, because neighbouring rounds are not independent."""


@dataclass(frozen=True)
class Sample:
    """One measurement; bytes, counts and seconds.

    Attributes:
        resident, proportional, private: bytes of memory in use: all pages, shared ones divided among their processes,
            and those of this process alone (RSS, PSS and USS).
        anonymous: those that belong to no file, in memory or swapped out. The pages of a library count as private or
            not by what other processes have loaded.
        trimmed: ``anonymous`` after malloc gave back the free pages that it keeps for later, some hundred megabytes
            that come and go. What stays is in use, or lies on a page with something in use, so this is the figure to
            judge by. As ``anonymous`` if the C library cannot give pages back.
        allocated: bytes that malloc has given out; ``trimmed`` beyond it grows if freed memory is scattered.
        files: open files by kind: file, socket, pipe, and the kinds of anonymous ones.
        threads: threads of the process.
        python_threads: those that Python knows, by name.
        children: child processes.
        objects: objects that Python's collector tracks, after a collection.
        temporary: files and folders in the system's temporary folder.
        cpu_seconds: of the process so far.
    """

    resident: int
    proportional: int
    private: int
    anonymous: int
    trimmed: int
    allocated: int
    files: dict[str, int]
    threads: int
    python_threads: dict[str, int]
    children: int
    objects: int
    temporary: int
    cpu_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def sample() -> Sample:
    """Collect garbage, measure this process, and give freed memory back to the system."""
    gc.collect()
    rollup = (_SELF / "smaps_rollup").read_text()
    trim()
    after = (_SELF / "smaps_rollup").read_text()
    rss, pss, *private = (_kilobytes(rollup, name) for name in ("Rss", "Pss", "Private_Clean", "Private_Dirty"))
    return Sample(
        resident=rss,
        proportional=pss,
        private=sum(private),
        anonymous=_kilobytes(rollup, "Anonymous") + _kilobytes(rollup, "Swap"),
        trimmed=_kilobytes(after, "Anonymous") + _kilobytes(after, "Swap"),
        allocated=allocated(),
        files=dict(sorted(Counter(_open_files()).items())),
        threads=len(os.listdir(_SELF / "task")),
        python_threads=dict(sorted(Counter(re.sub(r"\d+", "N", t.name) for t in threading.enumerate()).items())),
        children=len(_children()),
        objects=len(gc.get_objects()),
        temporary=sum(len(folders) + len(files) for _, folders, files in os.walk(tempfile.gettempdir())),
        cpu_seconds=time.process_time(),
    )


def _kilobytes(rollup: str, name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", rollup, re.MULTILINE)
    assert match, name
    return int(match[1]) * 1024


def _open_files() -> list[str]:
    kinds = []
    for name in os.listdir(_SELF / "fd"):
        try:
            target = os.readlink(_SELF / "fd" / name)
        except FileNotFoundError:  # the folder that was being listed
            continue
        kinds.append("file" if target.startswith("/") else target.partition(":[")[0].removeprefix("anon_inode:"))
    return kinds


def _children() -> list[str]:
    return [
        child
        for task in os.listdir(_SELF / "task")
        for child in (_SELF / "task" / task / "children").read_text().split()
    ]


class _MallocInfo(ctypes.Structure):
    """``struct mallinfo2`` of glibc's malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def allocated() -> int:
    """Return the bytes that glibc's malloc has given out and not got back; 0 without glibc 2.33."""
    function = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if function is None:
        return 0
    function.restype = _MallocInfo
    information = function()
    return int(information.uordblks + information.hblkhd)


def trim() -> bool:
    """Give freed pages back to the system; return whether this C library can."""
    function = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return function is not None and function(0) >= 0


def use_one_arena() -> bool:
    """Let all threads share one arena of glibc's malloc, unless the environment says otherwise; return whether they do.

    Each thread has an arena of its own otherwise, whose free end ``malloc_trim`` never gives back.
    """
    if "MALLOC_ARENA_MAX" in os.environ:
        return os.environ["MALLOC_ARENA_MAX"] == "1"
    function = getattr(ctypes.CDLL(None), "mallopt", None)
    return function is not None and function(_M_ARENA_MAX, 1) == 1


@dataclass(frozen=True)
class Trend:
    """A straight line through the values of successive rounds.

    Attributes:
        slope: change per round.
        low, high: the 95 % confidence interval of the slope.
        growth: the line's rise from first to last, as a share of the mean.
        mean: of the values.
        rounds: how many values.
    """

    slope: float
    low: float
    high: float
    growth: float
    mean: float
    rounds: int


def trend(values: Sequence[float]) -> Trend:
    """Fit a line by least squares to averages of blocks of rounds.

    Args:
        values: at least three, one per round.

    Raises:
        ValueError: for fewer.
    """
    if len(values) < 3:
        raise ValueError(f"a trend needs at least 3 rounds, got {len(values)}")
    parts = np.array_split(np.arange(len(values)), min(BLOCKS, len(values)))
    x = np.array([part.mean() for part in parts])
    y = np.array([statistics.fmean(values[i] for i in part) for part in parts])
    centred = x - x.mean()
    slope = float(centred @ (y - y.mean()) / (centred @ centred))
    rest = y - y.mean() - slope * centred
    error = float(np.sqrt(rest @ rest / (len(x) - 2) / (centred @ centred)))
    margin = float(student.ppf(0.975, len(x) - 2)) * error
    mean = float(y.mean())
    growth = slope * (len(values) - 1) / mean if mean else 0.0
    return Trend(slope, slope - margin, slope + margin, growth, mean, len(values))
