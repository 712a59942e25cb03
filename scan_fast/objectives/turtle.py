"""The TURTLE objective (Gadetsky, Jiang and Brbić, ICML 2024, https://arxiv.org/abs/2406.07236)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from .. import distributed
from ..evaluation.model_selection import modularity
from ..ops.collectives import all_gather
from .base import Heads, Objective
from .prior import ClusterPrior, PriorSettings, mean_of_batch

_BETAS = (0.9, 0.999)
_EPSILON = 1e-8


class TURTLESettings(PriorSettings):
    """TURTLE: labels that a linear probe learns in a few steps, spread over the clusters. Neighbours play no part.

    Attributes:
        entropy_weight: weight of the entropy of the mean label, or of its divergence from ``prior``.
        inner_steps: steps of Adam that a fresh probe takes on the labels of each batch.
        inner_lr: learning rate of the probes, whose features are standardised.
        prior: relative sizes of the clusters, as in SCAN.
    """

    kind: Literal["turtle"] = "turtle"
    entropy_weight: float = Field(default=10.0, ge=0)
    inner_steps: int = Field(default=10, ge=1)
    inner_lr: float = Field(default=1e-3, gt=0)

    def build(self) -> TURTLE:
        """Create the objective."""
        return TURTLE(self)


class TURTLE(Objective):
    """Minimises the cross-entropy of labels with the predictions of probes that were trained on them.

    In each step, fresh linear probes (one for each head, with weights of zero) learn the batch's labels. The gradient
    goes through the labels, not through the probes. The score is minus the modularity of the labels on the graph of
    neighbours: how much more often neighbours predict an image's label than chance does.
    """

    def __init__(self, settings: TURTLESettings) -> None:
        self.settings = settings
        self.prior = ClusterPrior(settings.prior)

    def start(self, logits: Callable[[], Tensor]) -> None:
        """Take the sizes of the clusters from the initial predictions, if the prior needs them."""
        self.prior.start(logits)

    def loss(self, heads: Heads, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each head, and the means over the heads of the loss and its terms."""
        logits = heads(anchors)
        with torch.autocast(logits.device.type, enabled=False):
            labels = (logits if logits.dtype == torch.float64 else logits.float()).softmax(dim=-1)
            log_q = self._log_q(anchors, labels)
            cross_entropy = -(labels * log_q).sum(dim=-1).mean(dim=-1)
            mean = mean_of_batch(labels)
            entropy = self.prior.entropy(mean)
            spread = -entropy if self.prior.uniform else self.prior.divergence(mean, entropy)
            total = cross_entropy + self.settings.entropy_weight * spread
        metrics = {"loss": total, "cross_entropy": cross_entropy, "entropy": entropy}
        if not self.prior.uniform:
            metrics["divergence"] = spread
        return total, {name: value.mean() for name, value in metrics.items()}

    def _log_q(self, features: Tensor, labels: Tensor) -> Tensor:
        """Return the log probabilities of probes that learned the labels of the whole batch, of this rank's images."""
        steps, lr = self.settings.inner_steps, self.settings.inner_lr
        if not distributed.several():
            return probe_log_probabilities(features, labels, steps, lr)
        everyone = all_gather(labels).movedim(0, 1).flatten(1, 2)  # (H, B of all ranks, C)
        log_q = probe_log_probabilities(all_gather(features).flatten(0, 1), everyone, steps, lr)
        return log_q.split(len(features), dim=1)[distributed.current().rank]

    def score(self, logits: Tensor, neighbors: Tensor) -> Tensor:
        """Return minus the modularity of each head's labels on the graph of neighbours."""
        return -modularity(logits.argmax(dim=-1), neighbors, logits.shape[-1])

    def state(self) -> dict[str, Any]:
        """Return the prior."""
        return self.prior.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the prior."""
        self.prior.load_state(state)


@torch.no_grad()
def probe_log_probabilities(features: Tensor, labels: Tensor, steps: int, lr: float) -> Tensor:
    """Train linear probes on soft labels, and return their log probabilities of the same images.

    Args:
        features: (B, D); they are centred and divided by their root mean square, so that ``lr`` fits any backbone.
        labels: (H, B, C) probabilities, whose dtype is that of the computation.
        steps: steps of Adam on the cross-entropy of all B images, from weights and biases of zero.
        lr: their learning rate.

    Returns:
        (H, B, C) logarithms of the probes' probabilities.
    """
    heads, rows, clusters = labels.shape
    inputs = features.to(labels.dtype)
    inputs = inputs - inputs.mean(dim=0)
    inputs = inputs / inputs.square().mean().sqrt().clamp_min(_EPSILON)
    inputs = F.pad(inputs, (0, 1), value=1.0)  # the last weight is the bias
    targets = labels.movedim(1, 0)  # (B, H, C)
    weight = inputs.new_zeros((inputs.shape[1], heads * clusters))
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)

    def log_probabilities() -> Tensor:
        return (inputs @ weight).view(rows, heads, clusters).log_softmax(dim=-1)

    for step in range(1, steps + 1):
        error = (log_probabilities().exp() - targets).reshape(rows, heads * clusters)
        gradient = inputs.mT @ error / rows
        first.lerp_(gradient, 1 - _BETAS[0])
        second.lerp_(gradient.square(), 1 - _BETAS[1])
        scale = math.sqrt(1 - _BETAS[1] ** step)
        weight.addcdiv_(first, second.sqrt().div_(scale).add_(_EPSILON), value=-lr / (1 - _BETAS[0] ** step))
    return log_probabilities().movedim(0, 1)
