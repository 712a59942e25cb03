"""The SCAN objective (Van Gansbeke et al., ECCV 2020, https://arxiv.org/abs/2005.12320, equation 2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ..evaluation.model_selection import selection_loss
from ..losses import scan_loss
from .base import Heads, Objective, ObjectiveSettings


class SCANSettings(ObjectiveSettings):
    """SCAN: an image and its neighbour agree, and the clusters spread over all images.

    Attributes:
        entropy_weight: weight of the entropy of the mean prediction. Higher values even out the cluster sizes.
    """

    kind: Literal["scan"] = "scan"
    entropy_weight: float = Field(default=5.0, ge=0)

    def build(self) -> SCAN:
        """Create the objective."""
        return SCAN(self)


class SCAN(Objective):
    """Minimises the SCAN loss; selects by the SCAN loss with entropy weight 1, as the reference does."""

    def __init__(self, settings: SCANSettings) -> None:
        self.settings = settings

    def loss(self, heads: Heads, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the SCAN loss of each head, and the means over the heads of the loss and its two terms."""
        total, consistency, entropy = scan_loss(heads(anchors), heads(neighbors), self.settings.entropy_weight)
        return total, {"loss": total.mean(), "consistency": consistency.mean(), "entropy": entropy.mean()}

    def score(self, logits: Tensor, neighbors: Tensor) -> Tensor:
        """Return consistency minus entropy over all pairs of an image and a neighbour."""
        total, _, _ = selection_loss(logits.log_softmax(dim=-1), neighbors)
        return total
