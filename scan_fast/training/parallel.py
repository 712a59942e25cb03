"""A training step on several ranks: each computes its part of the batch, and all take the same update.

Batches are global. A rank's loss is its share: the mean over the ranks is the loss of the whole batch, and
DistributedDataParallel averages the gradients. So the update is that of one process, beyond rounding.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import distributed

Compute = Callable[[Any], tuple[Tensor, dict[str, Tensor]]]
"""Maps a batch to the loss, and to the scalars to average."""

AGREEMENT_SECONDS = 1.0
"""Time after which the ranks agree again on whether a checkpoint is due."""


class _Step(nn.Module):
    """A stage's step as a module that holds all networks in training, so that one wrapper serves all of them."""

    def __init__(self, networks: Sequence[nn.Module], compute: Compute) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self._compute = compute

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of this rank's part of the batch, and the scalars."""
        return self._compute(batch)


def on_all_ranks(
    compute: Compute, networks: Sequence[nn.Module], device: torch.device, *, own_buffers: bool
) -> Compute:
    """Return a step whose backward pass averages the gradients over the ranks; ``compute`` itself without several.

    Args:
        compute: the step.
        networks: all modules that the optimiser updates. Those of rank 0 count: their weights are sent to all.
        device: the device of their weights.
        own_buffers: the networks' buffers differ between ranks after a step, as with the statistics of each rank's
            images in batch normalisation. Those of rank 0 are then sent to all before each step.
    """
    if not distributed.several():
        return compute
    # PyTorch 2.14 has another name for it, and warns of the old one.
    known = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    sent: dict[str, Any] = {name: own_buffers}
    return DistributedDataParallel(
        _Step(networks, compute),
        device_ids=[device] if device.type == "cuda" else None,
        **sent,
        gradient_as_bucket_view=True,
        # The same weights take part in every step; some, such as a projector that a method does not use, in none.
        static_graph=True,
    )


def same_buffers(networks: Sequence[nn.Module]) -> None:
    """Give all ranks the buffers of rank 0."""
    if not distributed.several():
        return
    for network in networks:
        for buffer in network.buffers():
            torch.distributed.broadcast(buffer, src=0)


class Due:
    """Tells after which steps a checkpoint is due: on all ranks after the same.

    Rank 0 looks at its clock. With several ranks, it tells the others about once in a second.

    Args:
        seconds: returns the longest time between two checkpoints, which may change meanwhile.
    """

    def __init__(self, seconds: Callable[[], float]) -> None:
        self._seconds = seconds
        self._saved = self._agreed = time.perf_counter()
        self._steps = 0
        self._next = 1

    def saved(self) -> None:
        """Note that a checkpoint was made."""
        self._saved = time.perf_counter()

    def after_step(self) -> bool:
        """Count a step, and return whether a checkpoint is due."""
        if not distributed.several():
            return self._over()
        self._steps += 1
        if self._steps < self._next:
            return False
        return self._agree()

    def after_epoch(self) -> bool:
        """Return whether a checkpoint is due."""
        return self._agree() if distributed.several() else self._over()

    def _over(self) -> bool:
        return time.perf_counter() - self._saved >= self._seconds()

    def _agree(self) -> bool:
        now = time.perf_counter()
        per_step = (now - self._agreed) / max(1, self._steps)
        steps = 1 if self._seconds() == 0 else max(1, int(AGREEMENT_SECONDS / max(per_step, 1e-6)))
        due, self._next = distributed.agreed((self._over(), steps))
        self._agreed, self._steps = now, 0
        return due
