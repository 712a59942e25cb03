"""One process that feeds a batch of inputs to a target and writes down what happened."""

from __future__ import annotations

import gc
import json
import mmap
import os
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from . import guards
from .target import Target, empty

PACKAGE = f"{os.sep}scan_fast{os.sep}"
_PLACE = struct.Struct("<q")


@dataclass
class Finding:
    """An input that led to something else than a result or a permitted error.

    Attributes:
        target, seed, index: the input.
        kind: "error", "crash", "hang", "memory", "forbidden", or "harness" if the input could not be made.
        what: the error, the signal or what was tried.
        place: the last lines of the package in the traceback, or the end of the log of a process that died.
    """

    target: str
    seed: int
    index: int
    kind: str
    what: str
    place: str = ""

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return f"python -m tools.fuzz {self.target} --seed {self.seed} --index {self.index}"

    @property
    def signature(self) -> tuple[str, str, str]:
        """The same for findings that have the same cause, most likely."""
        return self.kind, self.what.partition(":")[0], self.place.rpartition(" < ")[0] or self.place


@dataclass
class Batch:
    """The counts of a batch."""

    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    slowest_index: int = -1
    errors: dict[str, int] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def add(self, other: Batch) -> None:
        """Add the counts of another batch."""
        self.inputs += other.inputs
        self.accepted += other.accepted
        self.refused += other.refused
        self.seconds += other.seconds
        if other.slowest > self.slowest:
            self.slowest, self.slowest_index = other.slowest, other.slowest_index
        self.errors = dict(Counter(self.errors) + Counter(other.errors))
        self.findings += other.findings

    def dump(self) -> str:
        """Return JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Batch:
        """Read what :meth:`dump` returned."""
        content = json.loads(text)
        content["findings"] = [Finding(**finding) for finding in content["findings"]]
        return cls(**content)


class Progress:
    """The number of the input that a process is at, in memory that it shares with its parent."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)

    @property
    def index(self) -> int:
        """The number of the input."""
        return int(_PLACE.unpack_from(self._memory)[0])

    @index.setter
    def index(self, index: int) -> None:
        _PLACE.pack_into(self._memory, 0, index)

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


def place_of(trace: TracebackType | None) -> str:
    """Return the last functions of the package in a traceback, from the inside, and the line that raised."""
    frames = traceback.extract_tb(trace)
    own = [f"{os.path.basename(f.filename)}:{f.name}" for f in frames if PACKAGE in f.filename][-3:]
    last = frames[-1] if frames else None
    raised = f"{os.path.basename(last.filename)}:{last.lineno}" if last else "?"
    return " < ".join([*reversed(own), raised])


def run_batch(target: Target, seed: int, first: int, stop: int, folder: Path, progress: Progress) -> Batch:
    """Feed the inputs ``first`` to ``stop`` in this process, which is the batch's own.

    Args:
        target: the target.
        seed: of the inputs.
        first: the first input.
        stop: the end of the inputs.
        folder: the working directory; emptied after each input.
        progress: is told each input before it is read.
    """
    batch = Batch()
    os.chdir(folder)
    guard = guards.Guard(folder)
    guards.limit_memory()
    warnings.simplefilter("ignore")
    sys.dont_write_bytecode = True
    gc.collect()
    gc.freeze()
    begin = time.perf_counter()
    for index in range(first, stop):
        progress.index = index
        finding, seconds = _feed_one(target, seed, index, folder, guard, batch)
        batch.inputs += 1
        if seconds > batch.slowest:
            batch.slowest, batch.slowest_index = seconds, index
        if finding is not None:
            batch.findings.append(finding)
    batch.seconds = time.perf_counter() - begin
    return batch


def _feed_one(
    target: Target, seed: int, index: int, folder: Path, guard: guards.Guard, batch: Batch
) -> tuple[Finding | None, float]:
    def finding(kind: str, what: str, place: str = "") -> Finding:
        return Finding(target.name, seed, index, kind, what[:500], place)

    try:
        given = target.make(seed, index)
    except Exception as error:
        return finding("harness", f"{type(error).__name__}: {_text_of(error)}", place_of(error.__traceback__)), 0.0
    found, refusal = None, ""
    memory = guards.peak_memory()
    guards.start_timer(target.seconds)
    begin = time.process_time()
    try:
        target.feed(given, folder)
    except target.permitted as error:
        refusal = type(error).__name__
    except guards.Forbidden:
        pass
    except BaseException as error:
        what = f"{type(error).__name__}: {_text_of(error)}"
        found = finding("error", what, place_of(error.__traceback__))
    seconds = time.process_time() - begin
    guards.start_timer(0)
    grown = guards.peak_memory() - memory
    if guard.seen:
        found = finding("forbidden", guard.seen[0])
        guard.seen.clear()
    elif found is None and grown > target.memory_mib:
        found = finding("memory", f"{grown} MiB more")
    if found is None and refusal:
        batch.refused += 1
        batch.errors[refusal] = batch.errors.get(refusal, 0) + 1
    elif found is None:
        batch.accepted += 1
    del given
    empty(folder)
    return found, seconds


def _text_of(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # an error whose text cannot be made is one
        text = "(no text)"
    return text.encode("ascii", "backslashreplace").decode()


def describe(given: Any) -> str:
    """Return an input as text of at most a few lines."""
    text = ascii(given)
    return text if len(text) <= 3000 else f"{text[:1500]} ... {text[-1500:]} ({len(text):,} characters)"
