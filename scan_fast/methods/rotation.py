"""RotNet: predict by which of four angles an image was turned (Gidaris et al., ICLR 2018, arXiv 1803.07728)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.backbones import ModelConfig
from ..models.heads import PretextModel
from ..views.parameters import SimCLRView, View
from .base import MethodSettings, PretextMethod

TURNS = 4
"""Rotations of each image: by 0, 90, 180 and 270 degrees."""


class RotationSettings(MethodSettings):
    """RotNet: all four rotations of an image pass the backbone, and a linear classifier tells them apart.

    The projector takes no part and stays random, so neighbours are searched in the backbone's space.

    Attributes:
        view: the random view that is turned; an open size is the source's. The default crops and mirrors, and leaves
            the colours as they are.
    """

    kind: Literal["rotation"] = "rotation"
    view: View = SimCLRView(kind="simclr", size=None, scale=(0.5, 1.0), jitter=0.0, grayscale=0.0)

    def check(self, model: ModelConfig, features: str) -> None:
        """Require mining in the backbone's space."""
        if features == "projection":
            raise ValueError("pretext.method=rotation trains no projector, so it needs mining.features=backbone")

    def side(self, size: int) -> int:
        """Return the view's side."""
        return self.view.resolved(size).side

    def passes(self, size: int) -> float:
        """Return the number of rotations."""
        return float(TURNS)

    def build(self, model: PretextModel, size: int) -> Rotation:
        """Create the method."""
        return Rotation(self, model, size)


class Rotation(PretextMethod):
    """Trains with the cross-entropy of the rotations."""

    def __init__(self, settings: RotationSettings, model: PretextModel, size: int) -> None:
        super().__init__(model)
        self.classifier = nn.Linear(model.out_features, TURNS).to(next(model.parameters()).device)
        self._view = settings.view.resolved(size)

    def views(self, epoch: int, epochs: int) -> Sequence[View]:
        """Return the view that is turned."""
        return (self._view,)

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy, and the share of rotations that are told right."""
        turned = torch.cat([images[0].rot90(turn, (2, 3)) for turn in range(TURNS)])
        logits = self.classifier(self.model.features(turned)).float()
        turns = torch.arange(TURNS, device=logits.device).repeat_interleave(len(images[0]))
        loss = F.cross_entropy(logits, turns)
        return loss, {"loss": loss, "rotation_acc": (logits.argmax(dim=1) == turns).float().mean()}

    def modules(self) -> list[nn.Module]:
        """Return the classifier."""
        return [self.classifier]

    def state(self) -> dict[str, Any]:
        """Return the classifier's weights."""
        return {"classifier": self.classifier.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore them."""
        self.classifier.load_state_dict(state["classifier"])
