"""A clustering stage that is interrupted as by Ctrl-C."""

from __future__ import annotations

from scan_fast.stages.clustering import Clustering


class Interrupted(Clustering):
    """Ends in its third step."""

    steps = 0

    def after_step(self) -> None:
        """Raise KeyboardInterrupt after the third step."""
        super().after_step()
        self.steps += 1
        if self.steps == 3:
            raise KeyboardInterrupt
