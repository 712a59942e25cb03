"""When a run has to stop: its time is up, or a signal came. Standard library only."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scan_fast.training.context import Context

STOP_SHARE = 0.02
"""When so much of the minutes is left, training stops at a checkpoint."""
EXIT_TIME = 3


class Stopped(BaseException):
    """The run ends here, and can go on later; like KeyboardInterrupt, nothing in between should catch it."""

    def __init__(self, status: str, code: int) -> None:
        super().__init__(status)
        self.status, self.code = status, code


class Watch:
    """Knows when to stop: when the time is up, or on SIGINT or SIGTERM.

    While a stage trains, the next step writes a checkpoint and the one after it stops; elsewhere it stops at once, and
    so does a second signal.
    """

    def __init__(self, minutes: float, begin: float) -> None:
        self.begin = begin
        self.seconds = 60 * minutes
        self.training = False
        self._wanted: Stopped | None = None
        self._saving = False

    @property
    def elapsed(self) -> float:
        """The seconds since this process began."""
        return time.monotonic() - self.begin

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals for the time."""
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
        """Stop between two stages, where nothing is under way.

        Raises:
            Stopped: where it is time.
        """
        if self._wanted is None and self.elapsed >= (1 - STOP_SHARE) * self.seconds:
            self._wanted = Stopped(f"time is up after {self.elapsed / 60:.1f} minutes", EXIT_TIME)
        if self._wanted is not None:
            raise self._wanted

    def after_step(self, context: Context) -> None:
        """Stop between two training steps, once a checkpoint holds them all."""
        try:
            self.check()
        except Stopped:
            if self._saving:
                raise
            # The loop asks after every step how old the last checkpoint may be: it writes one now.
            self._saving = True
            runtime = context.config.runtime.model_copy(update={"checkpoint_seconds": 0.0})
            context.config = context.config.model_copy(update={"runtime": runtime})
