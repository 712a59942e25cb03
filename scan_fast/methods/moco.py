"""MoCo (He et al., CVPR 2020, https://arxiv.org/abs/1911.05722; v2: https://arxiv.org/abs/2003.04297)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from .. import distributed
from ..errors import ConfigError
from ..models.heads import PretextModel
from ..models.moving_average import MovingAverage
from ..ops.collectives import all_gather
from .multi_view import LARGE, MultiViewMethod, MultiViewSettings, contrast

QUEUE_SIZE = 65_536
"""Rows of the queue in the paper, 5 % of ImageNet's images."""
MOMENTUM, SHORT_MOMENTUM = 0.999, 0.99
"""Decay of the key network in the paper, and for short trainings, in which it would hardly leave its start."""
LONG_TRAINING = 100_000
"""Steps from which on the paper's decay is taken if nobody has set one."""
IMAGES_PER_ROW = 8
"""Images for each row of a queue that nobody has set a size for, if they are few."""
FORWARD_SHARE = 1 / 3
"""Work of the second view, which passes the key network without a gradient, relative to a view that trains."""


class MoCoSettings(MultiViewSettings):
    """MoCo: a view attracts the other view's key; the keys of earlier batches, from a slowly moving network, repel.

    Negatives do not depend on the batch, so small batches suffice. It differs from the paper: the other images of the
    batch are negatives as well, both their first views and their keys, and batches are not shuffled for batch
    normalisation, which on one device would change nothing. The queue begins with random unit rows, as the published
    code's does. With small views, each of them is a query as well, and the loss is the mean over the queries.

    Attributes:
        temperature: of the NT-Xent loss, which takes no less than 1e-8.
        queue_size: keys of earlier batches, Q, at most as many as images: a longer queue would hold earlier keys of the
            image itself. None: 65,536, or an eighth of the images if that is fewer.
        momentum: decay of the moving average that is the key network. None: 0.999, as in the paper, for at least
            100,000 steps, and 0.99 for fewer, in which a slower average stays too close to the random start.
    """

    kind: Literal["moco"] = "moco"
    temperature: float = Field(default=0.2, ge=1e-8)
    queue_size: int | None = Field(default=None, ge=1)
    momentum: float | None = Field(default=None, gt=0, lt=1)

    def passes(self, size: int) -> float:
        """Return the pixels of all views; the second needs no gradient."""
        return super().passes(size) - 1 + FORWARD_SHARE

    def for_run(self, images: int, steps: int) -> Self:
        """Fill in the size of the queue and the momentum.

        Raises:
            ConfigError: if there are fewer images than rows in the queue, or fewer than two.
        """
        super().for_run(images, steps)
        if self.queue_size is not None and self.queue_size > images:
            raise ConfigError(
                f"pretext.method.queue_size={self.queue_size} is more than the {images} images: an image would be "
                f"compared with earlier keys of itself; give at most {images}"
            )
        size = self.queue_size or min(QUEUE_SIZE, max(1, images // IMAGES_PER_ROW))
        momentum = self.momentum or (SHORT_MOMENTUM if steps < LONG_TRAINING else MOMENTUM)
        return self.model_copy(update={"queue_size": size, "momentum": momentum})

    def build(self, model: PretextModel, size: int) -> MoCo:
        """Create the method. Settings that are still open have the paper's values."""
        return MoCo(self, model, size)


class MoCo(MultiViewMethod):
    """Trains with the NT-Xent loss of queries against keys and a queue of earlier keys."""

    def __init__(self, settings: MoCoSettings, model: PretextModel, size: int) -> None:
        super().__init__(settings, model, size)
        *_, last = model.contrastive_head.modules()
        assert isinstance(last, nn.Linear)
        self.settings = settings
        self.average = MovingAverage(model, settings.momentum or MOMENTUM)
        # As in training, and as the queries': the average of batch statistics would lag behind the weights.
        self.average.model.train()
        device = last.weight.device
        rows = torch.randn(settings.queue_size or QUEUE_SIZE, last.out_features).to(device)
        self.queue = F.normalize(rows, dim=1)
        self._next = torch.zeros((), dtype=torch.int64, device=device)
        self._keys = rows[:0]

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the NT-Xent loss of the queries: the first view and the small ones. The second view is the key."""
        queries = [rows.float() for rows in self.embeddings(self.model, images[:1], images[LARGE:])]
        with torch.no_grad():
            self._keys = F.normalize(self.average.model(images[1]).float(), dim=1)
        temperature, queue = self.settings.temperature, self.queue
        losses = [contrast(rows, self._keys, temperature, anchors="first", queue=queue) for rows in queries]
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
        return loss, {"loss": loss}

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the key network, and replace the oldest rows of the queue by the batch's keys, those of all ranks."""
        self.average.update()
        batch = all_gather(self._keys).flatten(0, 1) if distributed.several() else self._keys
        keys = batch[-len(self.queue) :]
        places = (self._next + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue.index_copy_(0, places, keys)
        self._next.add_(len(keys)).remainder_(len(self.queue))

    def state(self) -> dict[str, Any]:
        """Return the key network, the queue, and the place of its oldest row."""
        return {"average": self.average.state_dict(), "queue": self.queue, "next": int(self._next)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue with them."""
        self.average.load_state_dict(state["average"])
        self.queue.copy_(state["queue"])
        self._next.fill_(state["next"])
