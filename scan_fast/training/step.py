"""One training step: forward, loss, backward, update and running sums, without a host synchronisation.

With ``runtime.cuda_graphs`` the whole step is captured once as a CUDA graph and replayed, so that the host launches one
graph instead of some hundred kernels. Every step meets the conditions of a capture: shapes are static (views that grow
during training change them a few times), the learning rate and the sums are tensors on the device, and no branch
depends on a value on the device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import distributed
from ..errors import first_line
from .optimizers import AnyOptimizer
from .parallel import Compute

WARM_UP_STEPS = 3
"""Number of steps before a capture, in which libraries choose their kernels and allocate their workspaces."""


class Trained(Protocol):
    """Interface that :class:`TrainingStep` requires of a stage."""

    def step(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and the scalars to average."""

    def after_step(self) -> None:
        """Run after the update."""


class TrainingStep:
    """Carries out the steps of a stage.

    Args:
        stage: computes the loss.
        optimizer: from :func:`.optimizers.build_optimizer`.
        autocast: creates the mixed-precision context of the forward pass.
        capture: replay a CUDA graph; for models on a GPU only.
        say: gets a message if a capture fails; the steps then run kernel by kernel.
        compute: computes the loss and the scalars; the stage's step by default.

    Attributes:
        totals: the sums of the stage's metrics since :meth:`reset`, float64 scalars on the device.
    """

    def __init__(
        self,
        stage: Trained,
        optimizer: AnyOptimizer,
        autocast: Callable[[], AbstractContextManager[None]],
        *,
        capture: bool = False,
        say: Callable[[str], None] = print,
        compute: Compute | None = None,
    ) -> None:
        self.totals: dict[str, Tensor] = {}
        self._stage = stage
        self._compute = compute or stage.step
        self._optimizer = optimizer
        self._autocast = autocast
        self._say = say
        self._capture = capture
        self._warm = 0
        self._shapes: tuple[torch.Size, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()

    def __call__(self, batch: Any) -> None:
        """Run one step with a batch: a tensor or a tuple of tensors. If their shapes change, capture a new graph."""
        shapes = tuple(tensor.shape for tensor in (batch if isinstance(batch, tuple) else (batch,)))
        if shapes != self._shapes:
            self._shapes, self._graph, self._inputs, self._warm = shapes, None, (), 0
        if not self._capture:
            self._update(batch)
        elif self._warm < WARM_UP_STEPS:
            self._warm += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._update(batch)
            torch.cuda.current_stream().wait_stream(side)
        else:
            self._replay(batch)

    def reset(self, totals: Mapping[str, Tensor] | None = None) -> None:
        """Start the sums at zero, or at those of a checkpoint; a captured graph goes on adding to the same tensors."""
        for name, value in (totals or {}).items():
            if name not in self.totals:
                self.totals[name] = value.clone()
        for name, total in self.totals.items():
            if totals is not None and name in totals:
                total.copy_(totals[name])
            else:
                total.zero_()

    def share_totals(self) -> None:
        """Replace the sums by their means over all ranks."""
        if self.totals and distributed.several():
            for total, common in zip(
                self.totals.values(), distributed.mean(torch.stack(list(self.totals.values()))), strict=True
            ):
                total.copy_(common)

    def averages(self, steps: int) -> dict[str, float]:
        """Return the means over an epoch's steps. The host waits for the device here."""
        if not self.totals:
            return {}
        return dict(zip(self.totals, (torch.stack(list(self.totals.values())) / steps).tolist(), strict=True))

    def _update(self, batch: Any) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            loss, metrics = self._compute(batch)
        loss.backward()
        self._optimizer.step()
        self._stage.after_step()
        for name, value in metrics.items():
            if name not in self.totals:
                self.totals[name] = torch.zeros((), dtype=torch.float64, device=value.device)
            self.totals[name].add_(value.detach())

    def _replay(self, batch: Any) -> None:
        tensors = batch if isinstance(batch, tuple) else (batch,)
        if self._graph is None:
            # A capture executes nothing, so the first replay is this batch's step.
            self._inputs = tuple(tensor.clone(memory_format=torch.preserve_format) for tensor in tensors)
            graph = torch.cuda.CUDAGraph()
            try:
                self._optimizer.zero_grad(set_to_none=True)
                # Background threads that render views may allocate during the capture.
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    self._update(self._inputs if isinstance(batch, tuple) else self._inputs[0])
            except RuntimeError as error:
                self._capture = False
                self._say(f"the step cannot be captured in a CUDA graph ({first_line(error)}); going on without")
                self._optimizer.zero_grad(set_to_none=True)
                self._update(batch)
                return
            self._graph = graph
        for buffer, tensor in zip(self._inputs, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        self._graph.replay()
