"""Runs batches in processes, a few at a time, and attributes the end of a process to the input that it was at."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from . import guards
from .target import Target, empty
from .worker import Batch, Finding, Progress, run_batch

WALL_SECONDS = 120
"""Time after which a process that is still at the same input is ended, whether or not it computes."""


def memory_folder() -> str | None:
    """Return a folder for files in memory, since what commands write they also wait for; None if there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@dataclass(frozen=True)
class Task:
    """The inputs ``first`` to ``stop`` of a target."""

    target: Target
    seed: int
    first: int
    stop: int


def tasks_of(target: Target, seed: int, inputs: int, first: int = 0) -> list[Task]:
    """Return the tasks of so many inputs, each as long as the target wants its batches."""
    stop = first + inputs
    return [Task(target, seed, at, min(at + target.batch, stop)) for at in range(first, stop, target.batch)]


class _Child:
    """A process that works on a task, in a folder that shows what it wrote outside its working directory."""

    def __init__(self, task: Task, cage: Path) -> None:
        self._task = task
        self._cage = cage
        self._folder = cage / "work"
        self._folder.mkdir(parents=True, exist_ok=True)
        empty(self._folder)
        self._progress = Progress()
        self._progress.index = task.first
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._work()
        self._at, self._since = task.first, time.monotonic()
        self.killed = False

    def _work(self) -> NoReturn:
        code = 1
        try:
            # Nothing outside the working directory may be opened for writing later.
            result = os.open(self._cage / "result", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            log = (self._cage / "log").open("w")
            null = os.open(os.devnull, os.O_RDWR)
            for number, target in enumerate((null, null, log.fileno())):
                os.dup2(target, number)
            guards.dump_on_timer(log)
            task = self._task
            batch = run_batch(task.target, task.seed, task.first, task.stop, self._folder, self._progress)
            with os.fdopen(result, "w") as file:
                file.write(batch.dump())
            code = 0
        except BaseException:  # a defect of the harness or of a target's make()
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def look(self) -> None:
        """End the process if it has been at one input for too long."""
        if self._progress.index != self._at:
            self._at, self._since = self._progress.index, time.monotonic()
        elif time.monotonic() - self._since > WALL_SECONDS and not self.killed:
            self.killed = True
            os.kill(self.pid, signal.SIGKILL)

    def collect(self, status: int) -> tuple[Batch, list[Task]]:
        """Return what the ended process has found, and the tasks of the inputs whose results died with it."""
        code, index, task = os.waitstatus_to_exitcode(status), self._progress.index, self._task
        self._progress.close()
        log = (self._cage / "log").read_text(errors="replace")
        rest: list[Task] = []
        if code > 0:
            raise RuntimeError(f"{task.target.name}: the harness failed at input {index}:\n{log[-3000:]}")
        if code == 0:
            batch = Batch.load((self._cage / "result").read_text())
        else:
            kind = "hang" if self.killed or -code == signal.SIGPROF else "crash"
            name = "it waits" if self.killed else signal.Signals(-code).name
            batch = Batch(inputs=1, findings=[Finding(task.target.name, task.seed, index, kind, name, _stack(log))])
            parts = (replace(task, stop=index), replace(task, first=index + 1))
            rest = [part for part in parts if part.first < part.stop]
        if stray := {entry.name for entry in self._cage.iterdir()} - {"work", "log", "result"}:
            what = f"files appeared outside the working directory: {', '.join(sorted(stray)[:5])}"
            batch.findings.append(Finding(task.target.name, task.seed, task.first, "forbidden", what))
        shutil.rmtree(self._cage)
        return batch, rest


def _stack(log: str) -> str:
    """Return the innermost lines of what faulthandler wrote."""
    lines = [line.strip() for line in log.splitlines() if line.strip().startswith("File")]
    return " < ".join(line.removeprefix("File ").replace('"', "") for line in lines[:6])[-600:]


def run_tasks(
    tasks: Sequence[Task], processes: int = 1, done: Callable[[Task, Batch], None] | None = None
) -> dict[str, Batch]:
    """Run tasks in forked processes and return what was found, by the name of the target.

    Args:
        tasks: the batches.
        processes: the number of batches at a time.
        done: is told each batch that ended.

    Raises:
        RuntimeError: if an input could not be made.
    """
    results: dict[str, Batch] = {task.target.name: Batch() for task in tasks}
    waiting = list(reversed(tasks))
    running: dict[int, tuple[Task, _Child]] = {}
    number = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory_folder()) as place:
        try:
            while waiting or running:
                while waiting and len(running) < processes:
                    task = waiting.pop()
                    child = _Child(task, Path(place) / f"{number}")
                    number += 1
                    running[child.pid] = task, child
                for pid in list(running):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if not ended:
                        running[pid][1].look()
                        continue
                    task, child = running.pop(pid)
                    batch, rest = child.collect(status)
                    waiting += reversed(rest)
                    results[task.target.name].add(batch)
                    if done is not None:
                        done(task, batch)
                if len(running) >= processes or not waiting:
                    time.sleep(0.005)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return results


def in_process(work: Callable[[], None]) -> None:
    """Do something in a forked process, so that its threads do not stay in this one.

    Raises:
        RuntimeError: if it fails.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the corpus of a target could not be made; see above")
