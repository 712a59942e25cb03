"""When a run has to stop: its time is up, or a signal came."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Ticker, Tracker
from scan_fast.training.context import Context

STOP_SHARE = 0.02
"""Part of the minutes that is left when training stops at a checkpoint."""
EXIT_TIME = 3


class Stopped(BaseException):
    """The run ends here and can be resumed; as with KeyboardInterrupt, nothing in between should catch it."""

    def __init__(self, status: str, code: int) -> None:
        super().__init__(status)
        self.status, self.code = status, code


class Watch:
    """Knows when to stop: when the time is up, or on SIGINT or SIGTERM.

    While a stage trains, the next step writes a checkpoint and the one after it stops. Elsewhere the run stops at once,
    and so it does on a second signal.
    """

    def __init__(self, minutes: float, begin: float) -> None:
        self.begin = begin
        self.seconds = 60 * minutes
        self.training = False
        self._wanted: Stopped | None = None
        self._saving = False

    @property
    def elapsed(self) -> float:
        """Seconds since this process began."""
        return time.monotonic() - self.begin

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGINT and SIGTERM in the block."""
        former = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        again = self._wanted is not None
        self._wanted = Stopped(f"interrupted by {signal.Signals(number).name}", 128 + number)
        if again or not self.training:
            raise self._wanted

    def check(self) -> None:
        """Stop between two stages.

        Raises:
            Stopped: if it is time.
        """
        if self._wanted is None and self.elapsed >= (1 - STOP_SHARE) * self.seconds:
            self._wanted = Stopped(f"time is up after {self.elapsed / 60:.1f} minutes", EXIT_TIME)
        if self._wanted is not None:
            raise self._wanted

    def after_step(self, context: Context) -> None:
        """Stop between two training steps, after a checkpoint that holds them all."""
        try:
            self.check()
        except Stopped:
            if self._saving:
                raise
            # After every step the loop asks how old the last checkpoint may be: now it writes one.
            self._saving = True
            runtime = context.config.runtime.model_copy(update={"checkpoint_seconds": 0.0})
            context.config = context.config.model_copy(update={"runtime": runtime})


class WatchedTicker(Ticker):
    """Counts steps, and stops the run after one if it is time."""

    def __init__(self, tracker: WatchedTracker, stage: str, total_steps: int, done_steps: int) -> None:
        super().__init__(tracker, stage, total_steps, done_steps)
        self._watched = tracker

    def step(self, images: int) -> None:
        super().step(images)
        self._watched.watch.after_step(self._watched.context)


class WatchedTracker(Tracker):
    """Prints and logs what a run says, and stops it when its time is up."""

    context: Context

    def __init__(self, run: RunFolder, watch: Watch, say: Callable[[str], None]) -> None:
        super().__init__(run, quiet=True)
        self.watch, self._say = watch, say

    def say(self, text: str) -> None:
        self._say(text)

    @contextmanager
    def progress(self, stage: str, total_steps: int, done_steps: int) -> Iterator[Ticker]:
        self.watch.training = True
        try:
            yield WatchedTicker(self, stage, total_steps, done_steps)
        finally:
            self.watch.training = False
