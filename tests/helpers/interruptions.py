"""Stages that are interrupted as by Ctrl-C."""

from __future__ import annotations

from typing import Any

from scan_fast.stages.clustering import Clustering
from scan_fast.stages.pretext import Pretext
from scan_fast.training.loop import Stage


class _Ending(Stage[Any]):
    """Ends in its third step."""

    steps = 0

    def after_step(self) -> None:
        """Raise KeyboardInterrupt after the third step."""
        super().after_step()
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt


class Interrupted(_Ending, Clustering):
    """A clustering stage that ends in its third step."""


class InterruptedPretext(_Ending, Pretext):
    """A pretext stage that ends in its third step."""
