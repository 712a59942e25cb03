"""Cases of batch normalisation with a residual and ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from scan_fast.ops import dispatch
from scan_fast.ops.batch_norm import batch_norm
from scan_fast.ops.self_tests.comparison import Slack, with_gradients

from . import Case, Tensors
from .gradients import gradient_cases, pair, shape_label

SHAPES = {
    "tiny": [(3, 8, 2, 3), (2, 5, 3, 3)],
    "smoke": [(33, 40, 5, 5), (256, 64, 32, 32)],
    "full": [(2, 3, 5, 7), (64, 64, 16, 16), (33, 40, 5, 5), (8, 512, 4, 4), (5, 130, 9, 9), (256, 64, 32, 32)],
}


@dataclass(frozen=True)
class Layer:
    """A form of the layer; calling it takes x, the residual (if any) and the gradient of the output."""

    residual: bool = False
    relu: bool = False
    training: bool = False
    unaligned: bool = False

    def __call__(self, impl: dispatch.Impl, x: Tensor, other: Tensor, upstream: Tensor) -> Tensors:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias, *running = _parameters(x.shape[1], kind, x.device)
        mean, var = (statistic.clone() for statistic in running)  # the call changes them
        if self.unaligned:
            other = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(other)

        def y(a: Tensor, w: Tensor, b: Tensor, *residual: Tensor) -> Tensor:
            added = residual[0] if residual else None
            return batch_norm(a, w, b, mean, var, residual=added, relu=self.relu, training=self.training, impl=impl)

        results = with_gradients(y, (x, weight, bias, *((other,) if self.residual else ())), upstream)
        return (*results, mean, var)

    def __str__(self) -> str:
        return " ".join(name for name in ("unaligned", "residual", "relu", "training") if getattr(self, name))


LAYERS = (
    Layer(relu=True, training=True),
    Layer(residual=True, relu=True, training=True),
    Layer(training=True),
    Layer(residual=True, relu=True),
)


def cases(size: str, kernels: str) -> Iterator[Case]:
    """Yield the cases of every form of the layer."""
    for shape in SHAPES[size]:
        # Every other tensor can be read by 16 bytes: the passes must agree on the meaning of a bit of the mask.
        odd = (Layer(residual=True, relu=True, training=True, unaligned=True),)
        for layer in (*LAYERS, *(odd if shape[1] % 8 == 0 and shape[0] <= 64 else ())):
            kernel, plain = partial(layer, "native"), partial(layer, "reference")
            label, draw = f"{shape_label(shape)} {layer}", partial(_draw, shape)
            # The gradient of x is a small remainder: of a channel of a few values, plain PyTorch errs by chance.
            yield from gradient_cases(label, size, draw, kernel, plain, slack=Slack(cpu=4))


@lru_cache(maxsize=4)
def _parameters(channels: int, kind: torch.dtype, device: torch.device) -> Tensors:
    """Return weight, bias, running mean and running variance, copied from the host.

    initcheck, which watches our kernels alone, takes what one of PyTorch's kernels has written for uninitialised.
    """
    values = torch.linspace(0.5, 1.5, channels, dtype=kind)
    return tuple(x.to(device) for x in (values, (values - 1) / 10, (values - 1) / 5, 2 * values))


@lru_cache(maxsize=2)
def _draw(shape: tuple[int, int, int, int], seed: int) -> Tensors:
    first, second, upstream = pair(shape, shape, torch.Generator().manual_seed(seed))
    # Half the values far above zero, half far below: rounding decides the sign of none before the ReLU.
    n, _, h, w = (torch.arange(size) for size in shape)
    side = 1.0 - 2 * ((n[:, None, None, None] + h[:, None] + w) % 2)
    first, second = side * (1 + first.abs() / 4), side * (second - first).abs()
    upstream = upstream * (1 + side / 2)  # related to x: the sums of the gradients do not cancel
    return tuple(x.contiguous(memory_format=torch.channels_last) for x in (first, second, upstream))
