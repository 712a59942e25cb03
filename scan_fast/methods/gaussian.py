"""Methods in which views attract while the embeddings of a batch keep a standard normal distribution.

Such methods compare no pairs of images, so their time and memory are linear in the batch. How far a batch is from the
distribution is measured on random directions, new ones in every step; the measure is what methods differ in.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from .. import distributed
from ..models.backbones import ModelConfig
from ..models.heads import PretextModel
from ..random import Key, normals
from .multi_view import LARGE, MultiViewMethod, MultiViewSettings

Measure = Callable[..., Tensor]
"""Maps embeddings (B, D) and directions (K, D) to the distance from the standard normal distribution, a scalar.

It is one of :mod:`scan_fast.ops.gaussian`, with ``gather_distributed`` and ``even``.
"""


class GaussianSettings(MultiViewSettings):
    """Base of these methods' settings.

    Attributes:
        weight: of the distance from the normal distribution, relative to that of the views.
        directions: random directions of each step.
    """

    weight: float = Field(default=1.0, ge=0)
    directions: int = Field(default=256, ge=1)

    @property
    @abstractmethod
    def measure(self) -> Measure:
        """The distance from the normal distribution."""

    def check(self, model: ModelConfig, features: str) -> None:
        """Require batch normalisation in the projector, without which hardly anything is learned."""
        if model.projector != "mlp_bn":
            raise ValueError(
                f"pretext.method={self.kind} needs model.projector=mlp_bn, got {model.projector}: without batch "
                "normalisation in the projector it learns hardly anything"
            )

    def build(self, model: PretextModel, size: int) -> GaussianMethod:
        """Create the method."""
        return GaussianMethod(self, model, size)


class GaussianMethod(MultiViewMethod):
    """Trains with the distance of views and that from the normal distribution."""

    def __init__(self, settings: GaussianSettings, model: PretextModel, size: int) -> None:
        super().__init__(settings, model, size)
        self.directions = Directions(settings.directions, next(model.parameters()).device)
        self._settings = settings

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weighted sum, and both terms."""
        rows = self.embed(images)
        with torch.autocast(rows[0].device.type, enabled=False):
            rows = [z.float() for z in rows]
            directions = self.directions.draw(rows[0].shape[1])
            distance = view_distance(rows)
            # Each rank has as many rows, and draws the same directions.
            ranks = {"gather_distributed": distributed.several(), "even": True}
            shape = torch.stack([self._settings.measure(z, directions, **ranks) for z in rows]).mean()
            loss = distance + self._settings.weight * shape
        return loss, {"loss": loss, "distance": distance, "shape": shape}

    def after_step(self) -> None:
        """Draw other directions in the next step."""
        self.directions.advance()

    def state(self) -> dict[str, Any]:
        """Return the state of the directions."""
        return {"directions": self.directions.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the directions."""
        self.directions.load_state(state["directions"])


def view_distance(rows: Sequence[Tensor]) -> Tensor:
    """Return the mean squared difference, per number, of all views (B, D) from the mean of the large ones."""
    centre = torch.stack(list(rows[:LARGE])).mean(dim=0)
    return torch.stack([(z - centre).square().mean() for z in rows]).mean()


class Directions:
    """Draws unit vectors by a step counter on the device, so that a captured step draws new ones when it is replayed.

    Args:
        count: number of directions, K.
        device: the device of the embeddings.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        first, second = torch.randint(0, 1 << 32, (2,)).tolist()
        self._key: Key = (first, second)
        self._step = torch.zeros((), dtype=torch.int64, device=device)

    def draw(self, dim: int) -> Tensor:
        """Return (K, dim) float32 directions of length one, the same until :meth:`advance`."""
        return F.normalize(normals(self._key, self._step, self.count, dim), dim=1)

    def advance(self) -> None:
        """Go to the next step."""
        self._step.add_(1)

    def state(self) -> dict[str, Any]:
        """Return what continues the directions."""
        return {"key": list(self._key), "step": int(self._step)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the directions."""
        first, second = state["key"]
        self._key = (int(first), int(second))
        self._step.fill_(int(state["step"]))
