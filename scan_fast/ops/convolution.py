"""Convolutions on a CPU: in bfloat16 with AMX or AVX-512-BF16, and the weight gradient of float32 ones.

The operators ``scan_fast::conv2d``, ``conv2d_forward``, ``conv2d_grad_input`` and ``conv2d_grad_weight`` and their
autograd are registered by the compiled module (``csrc/convolution/convolution_op.cpp``). Their reference is
:func:`torch.nn.functional.conv2d`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import native

_BLOCK = 32
"""Images that the kernel processes at once. The last block is padded, and computing the padding is wasted."""


def is_usable(device: str) -> bool:
    """Return whether a device has kernels for :func:`conv2d`. Only CPUs with AMX or AVX-512-BF16 do."""
    return native.has_kernel("conv2d_forward", device) and bool(
        torch.ops.scan_fast.conv2d_is_usable.default((_BLOCK, 32, 1, 1), (32, 32, 1, 1), 1, 0)
    )


def pays(x: Tensor, weight: Tensor, stride: int, padding: int) -> bool:
    """Return whether :func:`conv2d` supports these operands and is faster than PyTorch's convolution.

    It needs AMX or AVX-512-BF16, channels that are multiples of 32, a square kernel, and a batch that fills most of its
    last block of 32 images. Under torch.compile the answer is False.
    """
    batch = x.shape[0]
    return (
        not torch.compiler.is_compiling()
        and native.has_kernel("conv2d_forward", x.device.type)
        and 3 * -(-batch // _BLOCK) * _BLOCK <= 4 * batch
        and weight.dtype == torch.float32
        and weight.is_contiguous(memory_format=torch.channels_last)
        and weight.shape[2] == weight.shape[3]
        and bool(torch.ops.scan_fast.conv2d_is_usable.default(x.shape, weight.shape, stride, padding))
    )


@functools.cache
def _is_slow_in_onednn() -> bool:
    build = native.build_info()
    return build["cpu_gemm"] == "tiles" and build["cpu_isa"] != "avx512"


def grad_weight_pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether :func:`grad_weight` supports these operands and is faster than PyTorch's.

    It is on processors that are not Intel's, on which the kernels multiply in their own register tiles, and that have
    no AVX-512, with which PyTorch's is faster (Zen 5: benchmarks/results/cpu-convolution-avx512.json). Under
    torch.compile the answer is False.
    """
    return (
        not torch.compiler.is_compiling()
        and native.has_kernel("conv2d_forward", x.device.type)
        and _is_slow_in_onednn()
        and x.dtype == weight.dtype == torch.float32
        and x.shape[1] % 16 == 0
        and x.numel() > 0
        and weight.shape[2] == weight.shape[3]
    )


def grad_weight(grad_y: Tensor, x: Tensor, kernel: int, stride: int = 1, padding: int = 0) -> Tensor:
    """Return the gradient of the weights of a float32 convolution, with float32 sums.

    The result does not depend on the number of threads.

    Args:
        grad_y: (N, O, H', W') float32 in channels-last layout.
        x: (N, C, H, W) float32 in channels-last layout.
        kernel: side of the kernel.
        stride, padding: for both directions.

    Returns:
        (O, C, kernel, kernel) float32 in channels-last layout.

    Raises:
        ValueError: for another dtype, layout or shape.
    """
    return torch.ops.scan_fast.conv2d_grad_weight_float32.default(grad_y, x, kernel, stride, padding)


def conv2d(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolve images in bfloat16 with float32 sums.

    The gradient of the weights is float32 and never rounded. Neither results nor gradients depend on the number of
    threads.

    Args:
        x: (N, C, H, W) bfloat16 in channels-last layout; C a multiple of 32.
        weight: (O, C, k, k) float32 in channels-last layout, rounded to bfloat16 for the product; O a multiple of 32.
        stride, padding: for both directions; the padding must be below k.

    Returns:
        (N, O, H', W') bfloat16 in channels-last layout.

    Raises:
        ValueError: for another dtype, layout or shape, or a CPU without AMX and AVX-512-BF16.
    """
    return torch.ops.scan_fast.conv2d.default(x, weight, stride, padding)


def conv2d_fork(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Convolve images like :func:`conv2d`, and also return them, for a shortcut around the convolution.

    The kernel adds the gradients of both results and rounds their sum once. Autograd would write, read and add whole
    images.

    Returns:
        the result of :func:`conv2d`, and ``x`` as a tensor on the same memory. Neither may be changed in place.
    """
    return torch.ops.scan_fast.conv2d_fork.default(x, weight, stride, padding)


def _fake_forward(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    if x.ndim != 4 or weight.ndim != 4 or x.shape[1] != weight.shape[1] or weight.shape[2] != weight.shape[3]:
        raise ValueError(
            f"x must be (N, C, H, W) and weight (O, C, k, k), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if stride < 1 or padding < 0:
        raise ValueError(f"stride must be at least 1 and padding 0, got {stride} and {padding}")
    sides = [(side + 2 * padding - weight.shape[2]) // stride + 1 for side in x.shape[2:]]
    return _images(x, [x.shape[0], weight.shape[0], *sides])


def _fake_grad_input(
    grad_y: Tensor, weight: Tensor, addend: Tensor | None, sizes: list[int], stride: int, padding: int
) -> Tensor:
    return _images(grad_y, sizes)


def _fake_grad_weight(grad_y: Tensor, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
    if grad_y.ndim != 4 or x.ndim != 4:
        raise ValueError(f"grad_y and x must be images, got shapes {tuple(grad_y.shape)} and {tuple(x.shape)}")
    return _images(x.float(), [grad_y.shape[1], x.shape[1], kernel, kernel])


def _images(like: Tensor, sizes: list[int]) -> Tensor:
    return torch.empty(sizes, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _flops(y: Sequence[int], channels: int, kernel: int) -> int:
    return 2 * math.prod(y) * channels * kernel * kernel


# What torch.utils.flop_counter counts; each is called with the shapes of the operator's tensors.
def _forward_flops(x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return _flops(out_shape, weight[1], weight[2])


def _grad_input_flops(grad_y: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return _flops(grad_y, weight[1], weight[2])


def _grad_weight_flops(grad_y: Sequence[int], x: Sequence[int], kernel: int, *_: Any, **__: Any) -> int:
    return _flops(grad_y, x[1], kernel)


if native.is_available():
    for _operator, _formula in (
        (torch.ops.scan_fast.conv2d_forward, _forward_flops),
        (torch.ops.scan_fast.conv2d_grad_input, _grad_input_flops),
        (torch.ops.scan_fast.conv2d_grad_weight, _grad_weight_flops),
        (torch.ops.scan_fast.conv2d_grad_weight_float32, _grad_weight_flops),
    ):
        register_flop_formula(_operator)(_formula)
    torch.library.register_fake("scan_fast::conv2d_forward", _fake_forward)
    torch.library.register_fake("scan_fast::conv2d_grad_input", _fake_grad_input)
    torch.library.register_fake("scan_fast::conv2d_grad_weight", _fake_grad_weight)
    torch.library.register_fake("scan_fast::conv2d_grad_weight_float32", _fake_grad_weight)
