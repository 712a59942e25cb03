"""Exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class MovingAverage(Generic[M]):
    """Keeps an exponential moving average of a model: ``average = decay * average + (1 - decay) * weights``.

    The update is a few fused launches without a host synchronisation, so it can be part of a CUDA graph.
    (``torch.optim.swa_utils.AveragedModel`` reads its step counter on the host.)

    Args:
        model: the model to follow; the average starts as a copy of it, in evaluation mode and without gradients.
        decay: between 0 and 1; or a scalar tensor on the model's device, from 0 to 1, which may change between steps.
        buffers: ``"average"`` averages floating-point buffers like weights and copies the others (counters).
            ``"keep"`` leaves all buffers as they were at the start.

    Attributes:
        model: the averaged model.
    """

    def __init__(self, model: M, decay: float | Tensor, *, buffers: Literal["average", "keep"] = "average") -> None:
        # The value of a tensor is not read: the host would wait for the device.
        if not isinstance(decay, Tensor) and not 0 < decay < 1:
            raise ValueError(f"decay must be between 0 and 1, got {decay}")
        self.model: M = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay
        self.buffers = buffers
        own, other = self.model.state_dict(), model.state_dict()
        averaged = set(other) if buffers == "average" else {name for name, _ in model.named_parameters()}
        averaged = {name for name in averaged if own[name].is_floating_point()}
        self._averages, self._weights = _pick(own, averaged), _pick(other, averaged)
        self._own_rest, self._other_rest = _pick(own, own.keys() - averaged), _pick(other, own.keys() - averaged)

    @torch.no_grad()
    def update(self) -> None:
        """Move the average one step towards the model's weights."""
        if isinstance(self.decay, Tensor):
            changes = torch._foreach_sub(self._weights, self._averages)
            torch._foreach_mul_(changes, 1 - self.decay)
            torch._foreach_add_(self._averages, changes)
        else:
            torch._foreach_lerp_(self._averages, self._weights, 1 - self.decay)
        if self.buffers == "average" and self._own_rest:
            torch._foreach_copy_(self._own_rest, self._other_rest)

    @torch.no_grad()
    def write_back(self) -> None:
        """Replace the model's weights and buffers by the average's."""
        torch._foreach_copy_([*self._weights, *self._other_rest], [*self._averages, *self._own_rest])

    def state_dict(self) -> dict[str, Any]:
        """Return the averaged model's state dict."""
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.model.load_state_dict(state)


def _pick(state: dict[str, Tensor], names: set[str]) -> list[Tensor]:
    return [value for name, value in state.items() if name in names]
