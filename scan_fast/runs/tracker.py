"""Progress of a run on the terminal or in the log, in metrics.jsonl and, if configured, in TensorBoard."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID
from rich.table import Column, Table
from rich.text import Text

from .. import distributed
from ..errors import MissingPackageError
from ..text import shown
from .folder import RunFolder
from .records import MetricsEntry

LINE_SECONDS = 10.0
"""Shortest time between the lines of a stage if the output is no terminal."""
STEP_SECONDS = 60.0
"""Time after which an epoch that is not finished has a line."""
PASS_SECONDS = 1.0
"""Time after which a pass over images is shown on a terminal."""
NARROW = 90
"""Width in columns below which the progress of a stage has no bar, so that its line is not cut."""

log = logging.getLogger("scan_fast")


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
        elif time.perf_counter() - self._last_line >= STEP_SECONDS:
            self._last_line = time.perf_counter()
            self._tracker.say(
                f"{self._stage}: step {self._done}/{self._total}  {self._note}  {self._rate()}, {self._left()} left"
            )

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
    """Prints and records; nothing else in a run does. With several ranks, rank 0 does.

    Args:
        run: the folder that metrics go to.
        quiet: print nothing; lines go to the logger ``scan_fast`` at level INFO instead.
        tensorboard: also write metrics for TensorBoard.
        prefix: begins every line, such as "seed 3: ".

    Raises:
        MissingPackageError: if ``tensorboard`` is true and its package is not installed.
    """

    def __init__(self, run: RunFolder, *, quiet: bool = False, tensorboard: bool = False, prefix: str = "") -> None:
        self.run = run
        self._silent = not distributed.is_first()
        self.console = Console(quiet=quiet or self._silent, highlight=False)
        self._prefix = prefix
        self._live: Progress | None = None
        self._writer: Any = None
        if tensorboard and not self._silent:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise MissingPackageError(
                    "runtime.tensorboard=true needs the package tensorboard: pip install tensorboard"
                ) from error
            self._writer = SummaryWriter(str(run.path / "tensorboard"))

    def say(self, text: str) -> None:
        """Print one line, or log it if this tracker is quiet."""
        if self._silent:
            return
        line = shown(f"{self._prefix}{text}")
        if self.console.quiet:
            log.info("%s", line)
        else:
            self.console.print(line, markup=False, soft_wrap=True)

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
        with self._progress() as progress:
            ticker._progress = progress
            ticker._task = progress.add_task(
                f"{self._prefix}{stage}", total=total_steps, completed=done_steps, rate="", note=""
            )
            yield ticker

    @contextmanager
    def counted(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show how many of ``total`` images a pass has done: in a bar, or in a line now and then if it takes long.

        Args:
            what: what the pass computes, such as "mining: embeddings of train images".
            total: number of images.

        Yields:
            A function that is called with the number of further images done.
        """
        done, last = 0, time.perf_counter()

        def say(images: int) -> None:
            nonlocal done, last
            done += images
            if time.perf_counter() - last >= LINE_SECONDS and done < total:
                last = time.perf_counter()
                self.say(f"{what}: {done:,} of {total:,}")

        if self.console.quiet or not self.console.is_terminal:
            yield say
            return
        task: TaskID | None = None
        with ExitStack() as stack:

            def show(images: int) -> None:
                nonlocal done, task
                done += images
                if task is None and done < total and time.perf_counter() - last >= PASS_SECONDS:
                    live = self._live or stack.enter_context(self._progress())
                    task = live.add_task(f"{self._prefix}{what}", total=total, rate="", note="")
                    stack.callback(live.remove_task, task)
                if task is not None and self._live is not None:
                    self._live.update(task, completed=done)

            yield show

    @contextmanager
    def _progress(self) -> Iterator[Progress]:
        with progress_on(self.console) as progress:
            self._live = progress
            try:
                yield progress
            finally:
                self._live = None

    def table(self, title: str, columns: list[str], rows: list[list[str]]) -> None:
        """Print a table; the first column is left-aligned, the others are numbers."""
        print_table(title, columns, rows, self.console)


class _Line(ProgressColumn):
    """Name, position, rate, time left and metrics of a task as one line, of which a narrow terminal shows the start."""

    def render(self, task: Task) -> Text:
        """Return the line."""
        parts = [f"{task.description} {task.completed:.0f}/{task.total or 0:.0f}", task.fields["rate"]]
        if task.time_remaining is not None:
            parts.append(f"{timedelta(seconds=int(task.time_remaining))} left")
        line = shown("  ".join(filter(None, (*parts, task.fields["note"]))))
        return Text(line, no_wrap=True, overflow="ellipsis")


def progress_on(console: Console) -> Progress:
    """Return a progress display whose tasks take one line each, however narrow the terminal is."""
    columns: list[ProgressColumn] = [_Line(table_column=Column(no_wrap=True, overflow="ellipsis"))]
    if console.width >= NARROW:
        columns.insert(0, BarColumn(bar_width=20))
    return Progress(*columns, console=console, transient=True, speed_estimate_period=60.0)


def print_table(title: str, columns: list[str], rows: list[list[str]], console: Console | None = None) -> None:
    """Print a table; the first column is left-aligned, the others are numbers.

    On a terminal that is too narrow for it, a table first loses the lines between its columns, then the columns that
    have no title, and then the ends of the first column. Output that is no terminal is never cut.
    """
    console = console or Console(highlight=False)
    title, columns = shown(title), list(map(shown, columns))
    rows = [list(map(shown, row)) for row in rows]
    everything = console.options.update(max_width=1 << 16)

    def width_of(table: Table) -> int:
        return Measurement.get(console, everything, table).maximum

    console.print(Text(title, style="italic"), soft_wrap=True)
    table = _table(columns, rows)
    if not console.is_terminal:
        wide = Console(file=console.file, quiet=console.quiet, width=width_of(table), highlight=False)
        wide.print(table)
        return
    if width_of(table) > console.width:
        table = _table(columns, rows, lines=False)
    if width_of(table) > console.width:
        kept = [index for index, column in enumerate(columns) if column or index == 0]
        rows = [[row[index] for index in kept] for row in rows]
        columns = [columns[index] for index in kept]
        table = _table(columns, rows, lines=False)
        first = max(cell_len(cell) for cell in (columns[0], *(row[0] for row in rows)))
        excess = width_of(table) - console.width
        if excess > 0:
            table = _table(columns, rows, lines=False, first=max(1, first - excess))
    console.print(table)


def _table(columns: list[str], rows: list[list[str]], *, lines: bool = True, first: int | None = None) -> Table:
    """Return a table; ``first`` is the width to which the first column is cut."""
    table = Table(box=box.HEAVY_HEAD if lines else None, pad_edge=lines)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if index else "left"
        width = first if index == 0 else None
        table.add_column(escape(column), justify=justify, no_wrap=True, overflow="ellipsis", max_width=width)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _rounded(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.6g}") for key, value in metrics.items()}
