"""BYOL (Grill et al., NeurIPS 2020, https://arxiv.org/abs/2006.07733)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from ..models.heads import PretextModel
from ..models.moving_average import MovingAverage
from .moco import FORWARD_SHARE
from .multi_view import LARGE, MultiViewMethod, MultiViewSettings

MOMENTUM, SHORT_MOMENTUM = 0.996, 0.9
"""Decay of the target network at the start: in the paper, and the least for trainings in which that is too slow."""
TURNS = 10
"""Times that a short training replaces the target network at the least, by which its decay is chosen."""


class BYOLSettings(MultiViewSettings):
    """BYOL: a predictor maps the embedding of a view to that of another view by a slowly moving target network.

    No image repels another, so small batches suffice. What keeps all embeddings from becoming equal is the predictor,
    the slow target and batch normalisation. It differs from the paper: the loss is the mean over the pairs of views,
    not their sum, so a learning rate of plain SGD has to be twice the paper's. With small views, each of them predicts
    both large views, and the target network sees the large ones only.

    Attributes:
        momentum: decay of the moving average that is the target network, at the start. None: 0.996, as in the paper,
            if a training has 2,500 steps or more, and 1 - 10 / steps for fewer, but at least 0.9.
        rise_steps: steps in which the momentum rises to 1 by a cosine. None: the whole training, as in the paper; 0: it
            does not rise.
        predictor_dim: hidden width of the predictor. None: that of the projector.
    """

    kind: Literal["byol"] = "byol"
    momentum: float | None = Field(default=None, gt=0, lt=1)
    rise_steps: int | None = Field(default=None, ge=0)
    predictor_dim: int | None = Field(default=None, ge=1)

    def passes(self, size: int) -> float:
        """Return the pixels of all views; the large ones pass the target network, too, which needs no gradient."""
        return super().passes(size) + LARGE * FORWARD_SHARE

    def for_run(self, images: int, steps: int) -> Self:
        """Fill in the momentum and the steps in which it rises.

        Raises:
            ConfigError: if there are fewer than two images.
        """
        super().for_run(images, steps)
        momentum = self.momentum or min(MOMENTUM, max(SHORT_MOMENTUM, 1 - TURNS / steps))
        rise = steps if self.rise_steps is None else self.rise_steps
        return self.model_copy(update={"momentum": momentum, "rise_steps": rise})

    def build(self, model: PretextModel, size: int) -> BYOL:
        """Create the method. A momentum that is still open is the paper's, and does not rise if its steps are open."""
        return BYOL(self, model, size)


class BYOL(MultiViewMethod):
    """Trains with the distance of predictions of the target network's embeddings."""

    def __init__(self, settings: BYOLSettings, model: PretextModel, size: int) -> None:
        super().__init__(settings, model, size)
        device = next(model.parameters()).device
        dim = model.config.projection_dim
        hidden = settings.predictor_dim or model.config.hidden_dim or model.out_features
        self.predictor = nn.Sequential(
            nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, dim)
        ).to(device)
        self._momentum = settings.momentum or MOMENTUM
        self._rise_steps = settings.rise_steps or 0
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._decay = torch.full((), self._momentum, device=device)
        self.average = MovingAverage(model, self._decay if self._rise_steps else self._momentum)
        # As in training, and as the online network's: the average of batch statistics would lag behind the weights.
        self.average.model.train()

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean squared distance of unit vectors, prediction and target, over the pairs of views."""
        large, small = images[:LARGE], images[LARGE:]
        predictions = self.embeddings(lambda x: self.predictor(self.model(x)), large, small)
        with torch.no_grad():
            targets = self.embeddings(self.average.model, large)
        pairs = [(p, t) for p in range(len(predictions)) for t in range(LARGE) if p != t]
        cosines = [F.cosine_similarity(predictions[p].float(), targets[t].float(), dim=1).mean() for p, t in pairs]
        loss = 2 - 2 * torch.stack(cosines).mean()
        return loss, {"loss": loss}

    def modules(self) -> list[nn.Module]:
        """Return the predictor."""
        return [self.predictor]

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the target network by this step's momentum."""
        if self._rise_steps:
            share = (self._step / self._rise_steps).clamp(max=1)
            self._decay.copy_(1 - (1 - self._momentum) * (torch.cos(math.pi * share) + 1) / 2)
            self._step.add_(1)
        self.average.update()

    def state(self) -> dict[str, Any]:
        """Return the predictor, the target network and the number of steps."""
        return {
            "predictor": self.predictor.state_dict(),
            "average": self.average.state_dict(),
            "step": int(self._step),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        self.predictor.load_state_dict(state["predictor"])
        self.average.load_state_dict(state["average"])
        self._step.fill_(state["step"])
