"""The SCAN objective (Van Gansbeke et al., ECCV 2020, https://arxiv.org/abs/2005.12320, equation 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from .. import distributed
from ..evaluation.model_selection import selection_loss
from ..losses import scan_loss
from ..ops.scan_loss import scan_loss_distributed
from .base import Heads, Objective
from .prior import ClusterPrior, PriorSettings, mean_of_batch


class SCANSettings(PriorSettings):
    """SCAN: an image and its neighbour agree, and the clusters spread over all images.

    Attributes:
        entropy_weight: weight of the entropy of the mean prediction, or of its divergence from ``prior``. Higher values
            hold the cluster sizes closer to equal ones, or to ``prior``.
        prior: relative sizes of the clusters. ``uniform``: equal. ``estimated``: those of the clusters from which the
            heads start. Numbers, in any order: the largest is the size of the start's largest cluster, and so on.
    """

    kind: Literal["scan"] = "scan"
    entropy_weight: float = Field(default=5.0, ge=0)

    def build(self) -> SCAN:
        """Create the objective."""
        return SCAN(self)


class SCAN(Objective):
    """Minimises the SCAN loss; selects by it with entropy weight 1, as the reference does.

    With a prior, the divergence of the mean prediction from the prior takes the place of minus the entropy, in the loss
    and in the score. The two differ by a constant if all sizes are equal.
    """

    def __init__(self, settings: SCANSettings) -> None:
        self.settings = settings
        self.prior = ClusterPrior(settings.prior)

    def start(self, logits: Callable[[], Tensor]) -> None:
        """Take the sizes of the clusters from the initial predictions, if the prior needs them."""
        self.prior.start(logits)

    def loss(self, heads: Heads, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the SCAN loss of each head, and the means over the heads of the loss and its terms."""
        logits, others, weight = heads(anchors), heads(neighbors), self.settings.entropy_weight
        if distributed.several():
            total, consistency, entropy = scan_loss_distributed(logits, others, weight, impl="auto")
        else:
            total, consistency, entropy = scan_loss(logits, others, weight)
        metrics = {"consistency": consistency.mean(), "entropy": entropy.mean()}
        if not self.prior.uniform:
            divergence = self.prior.divergence(mean_of_batch(logits.float().softmax(dim=-1)), entropy)
            total = consistency + weight * divergence
            metrics["divergence"] = divergence.mean()
        return total, {"loss": total.mean(), **metrics}

    def score(self, logits: Tensor, neighbors: Tensor) -> Tensor:
        """Return consistency minus entropy, or plus the divergence, over all pairs of an image and a neighbour."""
        log_p = logits.log_softmax(dim=-1)
        total, consistency, _ = selection_loss(log_p, neighbors)
        if self.prior.uniform:
            return total
        return consistency + self.prior.divergence(log_p.double().exp().mean(dim=-2)).cpu()

    def state(self) -> dict[str, Any]:
        """Return the prior."""
        return self.prior.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the prior."""
        self.prior.load_state(state)
