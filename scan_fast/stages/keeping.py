"""The state of self-labelling to keep, judged without labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..evaluation.model_selection import modularity

TOLERATED = 0.25
"""Share of the start's score that a guarded state may lose: training that goes well has lost a tenth."""


class KeptState:
    """Keeps the best state, or the last one that has not collapsed, and never one that has lost a cluster instead.

    The score is the modularity of the clusters on the graph of neighbours: how much more often an image shares its
    cluster with a neighbour than sizes alone would bring about. It depends on the assignments alone, so growing
    confidence does not change it. A state that has fewer clusters in use than the first one is worse than any that has
    not; among such states more clusters are better. Of equal states the earlier one is kept.

    The neighbours are those of stage one, so a network that learns beyond them scores less although it is more often
    right. Guarded, the score tells only whether the clusters have collapsed: the last state counts that has all
    clusters of the first one and at least 1 - ``TOLERATED`` of its score.

    Args:
        guarded: keep the last state that has not collapsed; otherwise the best one.
    """

    def __init__(self, guarded: bool = False) -> None:
        self._guarded = guarded
        self._kept: dict[str, Any] | None = None
        self._first_used = 0
        self._least = 0.0

    @property
    def started(self) -> bool:
        """True once a state was judged."""
        return self._kept is not None

    @property
    def kept(self) -> dict[str, Any]:
        """Return the kept state: its weights ("model"), "epoch", "score" and the number of clusters in use ("used").

        Raises:
            ValueError: if no state was judged.
        """
        if self._kept is None:
            raise ValueError("no state was judged")
        return self._kept

    def lost(self, used: int) -> int:
        """Return how many of the clusters that the first state used are missing if ``used`` are in use."""
        return max(0, self._first_used - used)

    def judge(self, logits: Tensor, neighbors: Tensor, model: nn.Module, epoch: int) -> tuple[float, bool]:
        """Score a state, and keep it if it is better than the best so far or, guarded, if it has not collapsed.

        Args:
            logits: (N, C) of all images.
            neighbors: (N, k) int64 neighbours of the images, -1 for none.
            model: the network that computed them; its weights are copied if it is kept.
            epoch: number of the epoch after which it was, 0 for the start.

        Returns:
            the score, higher is better, and whether the state is kept.
        """
        clusters = logits.argmax(dim=1)
        used = int(clusters.unique().numel())
        score = float(modularity(clusters[None], neighbors, logits.shape[1])[0])
        if self._kept is None:
            self._first_used = used
            self._least = (1 - TOLERATED) * score
        elif self._guarded:
            if self.lost(used) or score < self._least:
                return score, False
        elif (-self.lost(used), score) <= (-self.lost(self._kept["used"]), self._kept["score"]):
            return score, False
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._kept = {"model": state, "epoch": epoch, "score": score, "used": used}
        return score, True

    def state(self) -> dict[str, Any]:
        """Return everything that judging depends on."""
        return {"kept": self._kept, "first_used": self._first_used, "least": self._least}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._kept, self._first_used = state["kept"], state["first_used"]
        self._least = state.get("least", 0.0)
