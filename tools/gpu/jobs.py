"""Runs the processes of the suite, each in its own process group and with limits. Standard library only."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

ROOT = Path(__file__).resolve().parents[2]
# The suite itself chooses the kernels and judges them.
UNJUDGED = {"SCAN_FAST_GPU_KERNELS": "portable", "SCAN_FAST_SELF_TEST": "off"}


@dataclass
class Job:
    """A process of a stage.

    Attributes:
        command: the program and its arguments.
        sets: the kernel sets that it runs, in its order.
        environment: variables besides ours.
        patience: seconds without a line after which it counts as hung.
        startup: the same before its first line, while PyTorch is loaded.
        complaints: pattern of lines that report an error of the case that began last; "" for none.
        prepares: whether it only prepares a later stage, so that its result does not count.
    """

    command: Sequence[str]
    sets: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    patience: float = 60.0
    startup: float = 60.0
    complaints: str = ""
    prepares: bool = False


@dataclass
class Outcome:
    """The end of a job.

    Attributes:
        status: "passed", "failed (code)", "hung after N s", or "cut off" when the stage's time was up.
        begun: the last line that began something without a result.
        tail: the last lines that were not JSON.
    """

    status: str
    begun: dict[str, Any] | None
    tail: list[str]


_running: set[subprocess.Popen[str]] = set()
_stopped = threading.Event()


def stop() -> None:
    """End all running jobs with their children, and start no other."""
    _stopped.set()
    for process in list(_running):
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def run(job: Job, seconds: float, log: TextIO, take: Callable[[dict[str, Any]], None]) -> Outcome:
    """Run a job for at most ``seconds`` and hand its JSON lines to ``take``."""
    if _stopped.is_set() or seconds <= 0:
        return Outcome("cut off", None, [])
    process = subprocess.Popen(
        job.command,
        cwd=ROOT,
        env={**os.environ, **UNJUDGED, "PYTHONUNBUFFERED": "1", **_environment(job)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    _running.add(process)
    try:
        return _followed(process, job, seconds, log, take)
    finally:
        _end(process)  # and its children
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)  # a process that waits for its GPU may survive for a while
        _running.discard(process)


def _environment(job: Job) -> dict[str, str]:
    """Return a job's environment; its PYTHONPATH comes before ours."""
    path = os.pathsep.join(part for part in (job.environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")) if part)
    return {**job.environment, **({"PYTHONPATH": path} if path else {})}


def _followed(
    process: subprocess.Popen[str], job: Job, seconds: float, log: TextIO, take: Callable[[dict[str, Any]], None]
) -> Outcome:
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in process.stdout:
                lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    last_line = time.monotonic()
    end, patience = last_line + seconds, job.startup
    begun: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    tail: list[str] = []
    while True:
        now = time.monotonic()
        if now > end:
            return Outcome("cut off", begun, tail)
        if now - last_line > patience:
            return Outcome(f"hung after {patience:.0f} s", begun, tail)
        try:
            line = lines.get(timeout=max(0.02, min(1.0, end - now, last_line + patience - now)))
        except queue.Empty:
            if process.poll() is not None and time.monotonic() - last_line > 3:
                break  # it has ended, and one of its children holds its output
            continue
        if line is None:
            break
        last_line, patience = time.monotonic(), job.patience
        log.write(line)
        entry = _parsed(line)
        if entry is None:
            text = line.strip("= \r\n")[:300]
            tail = [*tail[-11:], text] if text else tail
            if job.complaints and last is not None and re.search(job.complaints, line):
                take({**last, "complaint": text})
            continue
        if "begin" in entry:
            begun = last = entry
            continue
        if not begun or "passed" in entry or "done" in entry or "way" in entry or "timing" in entry:
            begun = None
        take(entry)
    log.flush()
    try:
        code = process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        return Outcome("hung as it ended", begun, tail)
    if _stopped.is_set():
        return Outcome("cut off", begun, tail)
    return Outcome("passed" if code == 0 else f"failed ({code})", begun, tail)


def _parsed(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None
