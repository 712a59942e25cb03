"""Progress of a run on the terminal, in metrics.jsonl and, if configured, in TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..errors import MissingPackageError
from .folder import RunFolder
from .records import MetricsEntry

LINE_SECONDS = 10.0
"""Shortest time between the lines of a stage if the output is no terminal."""


class Ticker:
    """Counts the steps of one stage and shows rate, loss and time left."""

    def __init__(self, tracker: Tracker, stage: str, total_steps: int, done_steps: int) -> None:
        self._tracker = tracker
        self._stage = stage
        self._total = total_steps
        self._done = done_steps
        self._first = done_steps
        self._images = 0
        self._begin = time.perf_counter()
        self._last_line = self._begin
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._note = ""

    def step(self, images: int) -> None:
        """Count one training step over ``images`` images."""
        self._done += 1
        self._images += images
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, rate=self._rate(), note=self._note)

    def epoch(self, epoch: int, epochs: int, metrics: Mapping[str, float]) -> None:
        """Show an epoch's metrics."""
        self._note = "  ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        now = time.perf_counter()
        if self._progress is None and (now - self._last_line >= LINE_SECONDS or epoch == epochs):
            self._last_line = now
            self._tracker.say(
                f"{self._stage}: epoch {epoch}/{epochs}  {self._note}  {self._rate()}, {self._left()} left"
            )

    def _rate(self) -> str:
        return f"{self._images / max(time.perf_counter() - self._begin, 1e-9):,.0f} images/s"

    def _left(self) -> str:
        spent = time.perf_counter() - self._begin
        seconds = (self._total - self._done) * spent / max(self._done - self._first, 1)
        return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


class Tracker:
    """Prints and records; nothing else in a run does.

    Raises:
        MissingPackageError: if ``tensorboard`` is true and its package is not installed.
    """

    def __init__(self, run: RunFolder, *, quiet: bool = False, tensorboard: bool = False) -> None:
        self.run = run
        self.console = Console(quiet=quiet, highlight=False)
        self._writer: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    "runtime.tensorboard=true needs the package tensorboard: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def say(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False, soft_wrap=True)

    def record(self, stage: str, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line of metrics; ``epoch`` counts finished epochs from 1, ``step`` the stage's steps."""
        self.run.append_metrics(MetricsEntry(stage, epoch, step, round(time.time(), 3), _rounded(metrics)))
        if self._writer is not None:
            for key, value in metrics.items():
                self._writer.add_scalar(f"{stage}/{key}", value, epoch)
            self._writer.flush()

    @contextmanager
    def progress(self, stage: str, total_steps: int, done_steps: int) -> Iterator[Ticker]:
        """Show a bar with rate and time left (or a line now and then) while a stage trains."""
        ticker = Ticker(self, stage, total_steps, done_steps)
        if not self.console.is_terminal or self.console.quiet:
            yield ticker
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        )
        with Progress(*columns, console=self.console, transient=True, speed_estimate_period=60.0) as progress:
            ticker._progress = progress
            ticker._task = progress.add_task(stage, total=total_steps, completed=done_steps, rate="", note="")
            yield ticker

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; the first column is left-aligned, the others are numbers."""
        table = Table(title=title, title_justify="left")
        for index, column in enumerate(columns):
            table.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self.console.print(table)


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.6g}") for key, value in metrics.items()}
