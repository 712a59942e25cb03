"""The best state of self-labelling so far, judged without labels."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..evaluation.model_selection import modularity


class BestState:
    """Keeps the state whose clusters agree best with the neighbours, and never one that has lost a cluster instead.

    The score is the modularity of the clusters on the graph of neighbours: how much more often an image shares its
    cluster with a neighbour than sizes alone would bring about. It depends on the assignments alone, so growing
    confidence does not change it. A state that has fewer clusters in use than the first one is worse than any that has
    not; among such states more clusters are better. Of equal states the earlier one is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Any] | None = None
        self._first_used = 0

    @property
    def started(self) -> bool:
        """True once a state was judged."""
        return self._kept is not None

    @property
    def kept(self) -> dict[str, Any]:
        """Return the best state: its weights ("model"), "epoch", "score" and the number of clusters in use ("used").

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
        """Score a state and keep it if it is better than the best so far.

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
        elif (-self.lost(used), score) <= (-self.lost(self._kept["used"]), self._kept["score"]):
            return score, False
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._kept = {"model": state, "epoch": epoch, "score": score, "used": used}
        return score, True

    def state(self) -> dict[str, Any]:
        """Return everything that judging depends on."""
        return {"kept": self._kept, "first_used": self._first_used}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._kept, self._first_used = state["kept"], state["first_used"]
