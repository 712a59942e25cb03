"""Interface of a clustering objective: a loss over neighbouring images, and a score that selects without labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..models.heads import ClusterModel
from ..schema import Settings

Heads = Callable[[Tensor], Tensor]
"""Maps features (B, D) to the logits of all heads, (H, B, C)."""


class Objective(ABC):
    """Trains cluster heads on pairs of an image and one of its neighbours.

    The clustering stage owns the pairs, the views, the optimiser and checkpoints. It calls :meth:`loss` in every step,
    and :meth:`score` to choose the epoch and the head.
    """

    def attach(self, model: ClusterModel) -> None:  # noqa: B027
        """Prepare for a model whose weights are those to start from, for example copy a teacher."""

    def start(self, logits: Callable[[], Tensor]) -> None:  # noqa: B027
        """Look at the initial predictions, for example for the sizes of the clusters from which the heads start.

        It is called once, before the first step. Keep what it finds in the state, because a resumed run does not call
        it again.

        Args:
            logits: computes (H, N, C) float32 of all training images under the initial weights. This is a pass over all
                images, so call it only if the result is needed.
        """

    @abstractmethod
    def loss(self, heads: Heads, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each head, (H,) float32, and scalars on the device to average over the epoch.

        The stage minimises the sum over the heads. The scalars must have "loss".

        With several ranks (:func:`scan_fast.distributed.several`) a batch is spread over them, with as many images on
        each, in the order of the ranks. The mean over the ranks of the loss, and of the gradients, must be that of the
        whole batch. What is kept must be the same on all ranks.

        Args:
            heads: the heads in training.
            anchors: (B, D) features of images.
            neighbors: (B, D) features of one neighbour of each.
        """

    @abstractmethod
    def score(self, logits: Tensor, neighbors: Tensor) -> Tensor:
        """Return the selection score of each head, (H,) float64 on the CPU; lower is better. Labels play no part.

        Args:
            logits: (H, N, C) of the images that the choice is made on: the test images, or all if there are none.
            neighbors: (N, k) int64 their neighbours among themselves, -1 for none.
        """

    def modules(self) -> list[nn.Module]:
        """Return modules besides the model that the optimiser updates. Keep them in the state."""
        return []

    def after_step(self) -> None:  # noqa: B027
        """Run after every update, for example to move an average."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the model: plain values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what :meth:`state` returned."""


class ObjectiveSettings(Settings):
    """Base of an objective's settings. A subclass has a ``kind`` and implements :meth:`build`."""

    kind: str

    @property
    def needs_start(self) -> bool:
        """True if the heads must start from clusters rather than at random."""
        return False

    def check(self, n_clusters: int) -> None:
        """Check the settings against the number of clusters.

        Raises:
            ConfigError: if a setting does not fit.
        """

    def build(self) -> Objective:
        """Create the objective."""
        raise NotImplementedError(f"{type(self).__name__} builds no objective")
