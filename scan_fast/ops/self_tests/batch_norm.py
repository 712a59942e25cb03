"""Self-test of batch normalisation with a residual and ReLU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from .comparison import FLOATS, Finding, Slack, Tensors, compared, generator, normal, uniform, with_gradients

MOMENTUM, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class _Layer:
    """One form of the layer; its methods take x, the residual (if any) and the gradient of the output."""

    residual: bool
    relu: bool
    training: bool

    def kernel(self, x: Tensor, other: Tensor, upstream: Tensor) -> Tensors:
        ops, last = torch.ops.scan_fast, torch.channels_last
        x, upstream = x.contiguous(memory_format=last), upstream.to(x.dtype).contiguous(memory_format=last)
        # A residual may begin at an address that is no multiple of a vector's width.
        odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].as_strided_(x.shape, x.stride())
        added = odd.copy_(other) if self.residual else None
        weight, bias, mean, var = _channels(x.shape[1], x.device, torch.float32)
        y, *kept = ops.batch_norm_forward(
            x, added, weight, bias, mean, var, self.training, MOMENTUM, EPS, self.relu, self.residual and self.relu
        )
        grads = ops.batch_norm_backward(upstream, x, weight, bias, *kept, self.training, self.relu, self.residual)
        return (y, mean, var, *(grad for i, grad in enumerate(grads) if self.residual or i != 1))

    def plain(self, x: Tensor, other: Tensor, upstream: Tensor) -> Tensors:
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias, mean, var = _channels(x.shape[1], x.device, wide)

        def y(x: Tensor, *more: Tensor) -> Tensor:
            *added, w, b = more
            return reference.batch_norm(
                x, added[0] if added else None, w, b, mean, var,
                training=self.training, momentum=MOMENTUM, eps=EPS, relu=self.relu,
            )  # fmt: skip

        leaves = (x, other, weight, bias) if self.residual else (x, weight, bias)
        value, *grads = with_gradients(y, leaves, upstream.to(x.dtype))
        return (value, mean, var, *grads)

    def __str__(self) -> str:
        words = (("residual", self.residual), ("ReLU", self.relu), ("training", self.training))
        return " ".join(word for word, wanted in words if wanted)


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare outputs, running statistics and gradients with the reference."""
    for shape, layer, dtypes in (
        ((2, 3, 5, 7), _Layer(residual=True, relu=True, training=True), FLOATS),
        ((8, 64, 6, 6), _Layer(residual=True, relu=True, training=True), FLOATS),
        ((8, 64, 6, 6), _Layer(residual=False, relu=True, training=True), FLOATS[:2]),
        ((9, 40, 5, 5), _Layer(residual=False, relu=False, training=True), FLOATS[:2]),
        ((9, 40, 5, 5), _Layer(residual=True, relu=True, training=False), FLOATS[:2]),
        ((4, 512, 3, 3), _Layer(residual=True, relu=False, training=True), FLOATS[:2]),
    ):
        g = generator()
        # Half the values far above zero, half far below: rounding decides the sign of none before the ReLU.
        n, _, h, w = (torch.arange(size, device="cpu") for size in shape)
        side = 1.0 - 2 * ((n[:, None, None, None] + h[:, None] + w) % 2)
        x, other = (side * (1 + normal(g, *shape).abs() / 4) for _ in range(2))
        cpu = (x, other, 1 + uniform(g, *shape))
        for dtype in dtypes:
            case = f"{'x'.join(map(str, shape))} {layer}"
            yield compared(case, dtype, device, layer.kernel, layer.plain, cpu, Slack())


def _channels(count: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Return weight, bias, running mean and running variance."""
    steps = torch.linspace(0.5, 1.5, count, dtype=torch.float32, device="cpu").to(device, dtype)
    return steps, (steps - 1) / 10, (steps - 1) / 5, 2 * steps
