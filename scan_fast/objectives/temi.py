"""The TEMI objective (Adaloglou, Michels, Kalisch and Kollmann, BMVC 2023, https://arxiv.org/abs/2303.17896)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from .. import distributed
from ..evaluation.model_selection import neighbor_pairs
from ..models.heads import ClusterModel
from ..models.moving_average import MovingAverage
from .base import Heads, Objective, ObjectiveSettings
from .prior import SMALLEST


class TEMISettings(ObjectiveSettings):
    """TEMI: pointwise mutual information of an image and its neighbour, weighted by how sure a teacher is of the pair.

    The paper divides logits by a temperature of 0.1, with a learning rate of 1e-4. Here the weights of the heads hold
    this factor, so that the probabilities of training are those of the result: Adam does the same with 1e-3.

    Attributes:
        beta: exponent of the product of the two probabilities. Below 1, it keeps images from ending in few clusters.
        decay: decay of the teacher heads, a moving average of the heads.
        marginal_decay: decay of the teacher's mean prediction, by which the clusters are weighted.
        weighted: weight each pair by the teacher's probability, over all heads, that both belong together.
    """

    kind: Literal["temi"] = "temi"
    beta: float = Field(default=0.6, gt=0, le=1)
    decay: float = Field(default=0.996, gt=0, lt=1)
    marginal_decay: float = Field(default=0.9, ge=0, lt=1)
    weighted: bool = True

    def build(self) -> TEMI:
        """Create the objective."""
        return TEMI(self)


class TEMI(Objective):
    """Minimises the TEMI loss against an averaged teacher; selects by that loss on held-out pairs.

    For an image x and a neighbour x', student probabilities q, teacher probabilities t and the teacher's running mean
    m, the loss is ``-log sum_c (q(c|x) t(c|x'))^beta / m(c)``, averaged over both directions and multiplied by the mean
    over the heads of ``sum_c t(c|x) t(c|x')``.
    """

    def __init__(self, settings: TEMISettings) -> None:
        self.settings = settings
        self._marginal: Tensor | None = None

    def attach(self, model: ClusterModel) -> None:
        """Copy the heads as the teacher."""
        self.teacher = MovingAverage(model.around(nn.Identity()), self.settings.decay)
        self._marginal = None

    def loss(self, heads: Heads, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of each head, and the means over the heads of the loss and of the weight of a pair."""
        students = [_log_probabilities(heads(features)) for features in (anchors, neighbors)]
        with torch.no_grad():
            teachers = [_log_probabilities(self.teacher.model.heads(features)) for features in (anchors, neighbors)]
            self._move_marginal(distributed.mean(torch.stack(teachers).exp().mean(dim=(0, 2))))
            log_m, weights = self.log_marginal(), self._weights(*teachers)
        losses = sum(
            _information(student, teacher, log_m, self.settings.beta)
            for student, teacher in zip(students, reversed(teachers), strict=True)
        )
        result = -(weights * losses).mean(dim=-1) / 2
        return result, {"loss": result.mean(), "weight": weights.mean()}

    def score(self, logits: Tensor, neighbors: Tensor) -> Tensor:
        """Return the loss of each head as its own teacher, over all pairs of an image and a neighbour."""
        log_p = _log_probabilities(logits)
        log_m = self.log_marginal().to(log_p.device)
        total = torch.zeros(len(log_p), dtype=torch.float64, device=log_p.device)
        pairs = 0
        for own, others, present in neighbor_pairs(log_p, neighbors):
            information = _information(own[:, :, None], others, log_m[:, None], self.settings.beta)
            total -= (self._weights(own[:, :, None], others) * information * present).sum(dim=(1, 2)).double()
            pairs += int(present.sum())
        return (total / pairs).cpu()

    def log_marginal(self) -> Tensor:
        """Return the logarithm of the teacher's running mean prediction, (H, C).

        Raises:
            RuntimeError: before the first step.
        """
        if self._marginal is None:
            raise RuntimeError("the mean prediction is known after the first step only")
        return self._marginal.clamp_min(SMALLEST).log()

    def after_step(self) -> None:
        """Move the teacher."""
        self.teacher.update()

    def state(self) -> dict[str, Any]:
        """Return the teacher and its mean prediction."""
        return {"teacher": self.teacher.state_dict(), "marginal": self._marginal}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the teacher and its mean prediction."""
        self.teacher.load_state_dict(state["teacher"])
        marginal = state["marginal"]
        self._marginal = None if marginal is None else marginal.clone()  # it moves in place

    def _move_marginal(self, mean: Tensor) -> None:
        if self._marginal is None:
            self._marginal = mean.clone()
        else:
            self._marginal.lerp_(mean, 1 - self.settings.marginal_decay)

    def _weights(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the mean over the heads of the probability of one cluster: (1, ...) for (H, ..., C)."""
        if not self.settings.weighted:
            return first.new_ones(())
        return (first + second).logsumexp(dim=-1).exp().mean(dim=0, keepdim=True)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Return logarithms of probabilities, in float32 under autocast too."""
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(dim=-1)


def _information(first: Tensor, second: Tensor, log_marginal: Tensor, beta: float) -> Tensor:
    """Return log sum_c (p(c) q(c))^beta / m(c): (H, ...) for log p, log q (H, ..., C) and log m (H, C) or (H, 1, C)."""
    return (beta * (first + second) - log_marginal[:, None]).logsumexp(dim=-1)
