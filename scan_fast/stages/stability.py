"""The end of a stage whose assignments no longer change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EVALUATIONS = 3
"""Number of evaluations in a row that must have changed little."""


class Stability:
    """Notices that the clusters of the images have stopped changing.

    Args:
        limit: largest share of the images that may change their cluster between two evaluations, in [0, 1); None: the
            assignments are never called stable.

    Attributes:
        changed: the share that changed between the last two evaluations; None before the second one.
        epoch: epoch of the last evaluation.
    """

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.changed: float | None = None
        self.epoch = 0
        self._clusters: Tensor | None = None
        self._calm = 0

    @property
    def reached(self) -> bool:
        """True if each of the last three evaluations changed at most the share that is allowed."""
        return self._calm >= EVALUATIONS

    def note(self, logits: Tensor, head: int, epoch: int) -> None:
        """Compare the assignments with those of the evaluation before.

        Args:
            logits: (H, N, C) of H heads.
            head: the head that counts in this evaluation; it is compared with itself.
            epoch: number of the epoch.
        """
        if self.limit is None:
            return
        clusters = logits.argmax(dim=-1).to(torch.int32).cpu()
        if self._clusters is not None:
            self.changed = float((clusters[head] != self._clusters[head]).double().mean())
            self._calm = self._calm + 1 if self.changed <= self.limit else 0
        self._clusters, self.epoch = clusters, epoch

    def notes(self, epochs: int) -> dict[str, Any]:
        """Return the entry of summary.json for a stage of ``epochs`` epochs: nothing if all of them were trained."""
        if not self.reached or self.epoch == epochs:
            return {}
        return {"stable": {"epoch": self.epoch, "of": epochs, "changed": self.changed}}

    def words(self, name: str, epochs: int) -> str | None:
        """Return what to say about the early end of the stage ``name``; None if all epochs were trained."""
        if not self.notes(epochs):
            return None
        share = f"at most {100 * (self.limit or 0):g} % of the assignments changed"
        return f"{name}: ended after epoch {self.epoch}/{epochs}: {share} in each of {EVALUATIONS} evaluations"

    def state(self) -> dict[str, Any]:
        """Return everything that the decision depends on."""
        return {"clusters": self._clusters, "calm": self._calm, "changed": self.changed, "epoch": self.epoch}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._clusters = None if state["clusters"] is None else state["clusters"].cpu()
        self._calm, self.changed, self.epoch = state["calm"], state["changed"], state["epoch"]
