"""The convolutions of a training step alone: with the same convolutions, no step is shorter than their time.

They are those of one real step, with its shapes, dtypes and layouts, forward and backward with the gradients that the
step needs. Each kind of layer runs by itself on random values, in the module that the step uses; its fastest run counts
as often as the layer occurs. So the figure has what the layers cost at their own sizes, and nothing else of a step: no
normalisation, views, loss or optimiser.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from scan_fast.data.loader import epoch_batches
from scan_fast.models.convolution import Conv2d
from scan_fast.random import stream_key
from scan_fast.training.context import Context
from scan_fast.training.loop import Stage

from .ceilings import best_seconds


@dataclass(frozen=True)
class Call:
    """A use of a convolution.

    Attributes:
        layer: its shapes and the class that computes it.
        shape: of the input.
        dtype: of the input.
        channels_last: whether the input has this layout.
        gradients: whether the step computes those of the input and of the weight.
    """

    layer: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    channels_last: bool
    gradients: tuple[bool, bool]


@dataclass(frozen=True)
class Convolutions:
    """The convolutions of one step of a stage, to be timed by themselves.

    Attributes:
        context: of the stage.
        counts: how often each kind occurs in a step.
        layers: one of each kind.
    """

    context: Context
    counts: Counter[Call]
    layers: dict[Call, nn.Conv2d]

    def seconds(self, repeats: int, pytorch: bool = False) -> float:
        """Return the seconds of those of a step alone, by the fastest of ``repeats`` runs of each kind.

        ``pytorch``: with PyTorch's algorithms, on the same operands.
        """
        with mock.patch.object(Conv2d, "forward", nn.Conv2d.forward) if pytorch else contextlib.nullcontext():
            return sum(count * _seconds(c, self.layers[c], self.context, repeats) for c, count in self.counts.items())


def convolutions_of_step(stage: Stage[Any], context: Context) -> Convolutions:
    """Make the forward pass of a step and return its convolutions."""
    counts: Counter[Call] = Counter()
    layers: dict[Call, nn.Conv2d] = {}

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not isinstance(module, nn.Conv2d):
            return
        (x,) = inputs
        grads = torch.is_grad_enabled()
        call = Call(
            f"{type(module).__qualname__} {module.extra_repr()}",
            tuple(x.shape),
            x.dtype,
            x.is_contiguous(memory_format=torch.channels_last),
            (grads and x.requires_grad, grads and module.weight.requires_grad),
        )
        counts[call] += 1
        layers[call] = module

    def fork(layer: Conv2d, x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), x

    indices = next(iter(epoch_batches(stream_key(0, "layers"), 0, stage.n_images, stage.training.batch_size)))
    stage.train_mode()
    # The kernel that hands its input on is no call of a module; the layer by itself does the same products.
    with mock.patch.object(Conv2d, "fork", fork), context.autocast():
        batch = stage.batch(0, indices)
        # Before this, the choice of a precision may run convolutions, which are not those of the step.
        handle = register_module_forward_pre_hook(note)
        try:
            stage.step(batch)
        finally:
            handle.remove()
    return Convolutions(context, counts, layers)


def _seconds(call: Call, layer: nn.Conv2d, context: Context, repeats: int) -> float:
    layout = torch.channels_last if call.channels_last else torch.contiguous_format
    x = torch.randn(call.shape, device=context.device).to(call.dtype).contiguous(memory_format=layout)
    leaves = [tensor for tensor, wanted in zip((x, layer.weight), call.gradients, strict=True) if wanted]
    x.requires_grad_(call.gradients[0])
    upstream: list[Tensor] = []

    def forward_and_backward() -> None:
        with torch.set_grad_enabled(bool(leaves)), context.autocast():
            y = layer(x)
        if leaves:
            if not upstream:
                upstream.append(torch.randn_like(y))
            torch.autograd.grad(y, leaves, upstream[0])

    return best_seconds(forward_and_backward, context.device.type, repeats)
