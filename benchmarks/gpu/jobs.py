"""Runs the suite's processes, each in a group of its own and with a limit; standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
# The suite itself chooses the kernels, and judges them.
UNJUDGED = {"SCAN_FAST_GPU_KERNELS": "portable", "SCAN_FAST_SELF_TEST": "off"}


@dataclass
class Job:
    """A process of a stage.

    Attributes:
        command: its words.
        sets: the kernel sets it is about, in its order.
        environment: what it gets besides ours.
        patience: seconds without a line after which it hangs.
    """

    command: Sequence[str]
    sets: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 60.0


@dataclass
class Outcome:
    """How a job ended.

    Attributes:
        status: "passed", "failed (code)", "hung after N s", or "cut off" when the stage's time was up.
        begun: the last line that began a case which has no result.
        tail: the last lines that were no JSON.
    """

    status: str
    begun: dict[str, Any] | None
    tail: list[str]


running: set[subprocess.Popen[str]] = set()


def end_all() -> None:
    """End every job that runs, with its children."""
    for process in list(running):
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run(job: Job, seconds: float, log: TextIO, take: Callable[[dict[str, Any]], None]) -> Outcome:
    """Run a job for at most ``seconds`` and hand its JSON lines to ``take``."""
    process = subprocess.Popen(
        job.command,
        cwd=ROOT,
        env={**os.environ, **UNJUDGED, "PYTHONUNBUFFERED": "1", **job.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    running.add(process)
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    end, heard = time.monotonic() + seconds, time.monotonic()
    begun: dict[str, Any] | None = None
    tail: list[str] = []
    status = ""
    while True:
        now = time.monotonic()
        if now > end or now - heard > job.patience:
            status = "cut off" if now > end else f"hung after {job.patience:.0f} s"
            _end(process)
            break
        try:
            line = lines.get(timeout=max(0.05, min(end - now, heard + job.patience - now)))
        except queue.Empty:
            continue
        if line is None:
            break
        heard = time.monotonic()
        log.write(line)
        entry = _parsed(line)
        if entry is None:
            tail = [*tail[-11:], line.rstrip()[:300]]
        elif "begin" in entry:
            begun = entry
        else:
            if "passed" in entry or "done" in entry or "way" in entry:
                begun = None
            take(entry)
    log.flush()
    process.wait()
    running.discard(process)
    if not status:
        status = "passed" if process.returncode == 0 else f"failed ({process.returncode})"
    return Outcome(status, begun, tail)


def _parsed(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
