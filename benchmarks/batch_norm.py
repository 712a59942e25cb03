"""Batch normalisation, residual and ReLU in training, forward and backward: ``python -m benchmarks.batch_norm``.

A size is N x C x H x W, followed by the dtype (default float32) and "residual" if one is added, such as
``128x64x32x32-bfloat16-residual``, in channels-last layout. The limit counts each tensor as often as the passes read or
write it, as if nothing stayed in a cache; layers that fit into a cache can therefore exceed it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from scan_fast.ops import reference
from scan_fast.ops.batch_norm import batch_norm

from . import peers
from .ceilings import Work
from .family import Family, main
from .harness import Case, Contender, Tensors

Layer = Callable[..., Tensor]


def _ours(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None) -> Tensor:
    return batch_norm(x, weight, bias, mean, var, residual=residual, training=True, impl="native")


def _plain(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, residual: Tensor | None) -> Tensor:
    options: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5, "relu": True}
    return reference.batch_norm(x, residual, weight, bias, mean, var, **options)


def _training_step(layer: Layer) -> Callable[..., Tensors]:
    def run(grad: Tensor, mean: Tensor, var: Tensor, *leaves: Tensor) -> Tensors:
        x, weight, bias, *residual = leaves
        y = layer(x, weight, bias, mean, var, residual[0] if residual else None)
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    return run


def _exact(grad: Tensor, mean: Tensor, var: Tensor, *leaves: Tensor) -> Tensors:
    doubles = (x.detach().double() for x in (mean, var))
    return _training_step(_plain)(grad.double(), *doubles, *(x.detach().double().requires_grad_() for x in leaves))


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``128x64x32x32-bfloat16``."""
    numbers, *words = size.split("-")
    shape = [int(part) for part in numbers.split("x")]
    unknown = set(words) - {"bfloat16", "float16", "residual"}
    if unknown or len(shape) != 4:
        raise ValueError(f"a size is NxCxHxW, then -bfloat16 or -float16, then -residual, got {size!r}")
    dtype = next((getattr(torch, word) for word in words if word != "residual"), torch.float32)
    residual = "residual" in words

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def images() -> Tensor:
            values = torch.randn(shape, generator=generator).to(dtype)
            return values.to(device).contiguous(memory_format=torch.channels_last)

        def per_channel() -> Tensor:
            return torch.rand(shape[1], generator=generator).to(device)

        leaves = (images(), 0.5 + per_channel(), per_channel() - 0.5, *((images(),) if residual else ()))
        return images(), per_channel(), 1 + per_channel(), *(x.requires_grad_() for x in leaves)

    elements = float(shape[0] * shape[1] * shape[2] * shape[3])
    # Forward: x twice, and y. Backward: x and the gradient of y twice, and the gradient of x. The residual and its
    # gradient once each, and the mask of the ReLU, a bit per element, written once and read twice.
    work = Work(flops=0.0, bytes=elements * (dtype.itemsize * (8 + 2 * residual) + residual * 3 / 8))
    # Rounding moves values across zero, where both gradients of the ReLU are right: few float32 values, and one in a
    # few hundred sums of separately rounded 16-bit values.
    ours, theirs = (0.003, 0.01) if dtype == torch.float32 else (0.005, 0.2)
    contenders = [
        Contender("scan-fast", _training_step(_ours), ours, work, skipped=peers.no_kernel("batch_norm", device)),
        Contender("eager", _training_step(_plain), theirs),
        Contender("torch.compile", _training_step(peers.compiled(_plain)), theirs, compiles=True),
    ]
    return Case(size, inputs, _exact, contenders)


def _sizes(images: int) -> tuple[str, ...]:
    """Return the layers of a ResNet-18 for 32-pixel images, as it trains; the first also in float32."""
    layers = [f"{images}x{channels}x{side}x{side}" for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4))]
    return *(f"{layer}-bfloat16{more}" for layer in layers for more in ("", "-residual")), layers[0]


FAMILY = Family(
    name="batch_norm",
    title="Batch normalisation and ReLU forward and backward",
    case=case,
    sizes={"cpu": _sizes(128), "cuda": _sizes(1024)},
    quick_sizes=("4x20x5x5", "8x16x6x6-bfloat16-residual"),
    memory_sizes={"cpu": ("128x64x32x32-bfloat16-residual",), "cuda": ("1024x64x32x32-bfloat16-residual",)},
    suite_sizes=("1024x64x32x32-bfloat16", "1024x64x32x32-bfloat16-residual", "1024x512x4x4-bfloat16-residual"),
)

if __name__ == "__main__":
    main(FAMILY)
