"""A convolution's passes for which there are kernels: ``python -m benchmarks.convolution --device cpu``.

A size is N x C x O x S x k x s: images, input and output channels, side, kernel, stride; the padding is k // 2.
Forward pass and both gradients in bfloat16: weights are float32, as in training under autocast; every contender rounds
them, and returns their gradient in float32. With the suffix ``-float32``, the weight gradient alone. There is no CUDA
kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scan_fast.ops import native
from scan_fast.ops.convolution import conv2d, grad_weight, pays

from . import peers
from .ceilings import Work
from .family import Family, main
from .harness import Case, Contender, Tensors

FLOAT32 = "-float32"


def case(size: str, device: str) -> Case:
    """Build the case of a size such as ``128x64x64x32x3x1`` or ``128x64x64x32x3x1-float32``."""
    return _weight_gradient(size, device) if size.endswith(FLOAT32) else _bfloat16(size, device)


def _weight_gradient(size: str, device: str) -> Case:
    images, in_channels, out_channels, side, kernel, stride = (
        int(part) for part in size.removesuffix(FLOAT32).split("x")
    )
    padding = kernel // 2
    out_side = (side + 2 * padding - kernel) // stride + 1
    like = torch.empty(out_channels, in_channels, kernel, kernel).contiguous(memory_format=torch.channels_last)

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        shapes = (images, in_channels, side, side), (images, out_channels, out_side, out_side)
        drawn = (torch.randn(shape, generator=generator) for shape in shapes)
        return tuple(x.to(device).contiguous(memory_format=torch.channels_last) for x in drawn)

    def of_pytorch(x: Tensor, grad: Tensor) -> Tensors:
        found = torch.ops.aten.convolution_backward(
            grad, x, like.to(x), None, (stride,) * 2, (padding,) * 2, (1, 1), False, (0, 0), 1, (False, True, False)
        )
        return (found[1],)

    def exact(x: Tensor, grad: Tensor) -> Tensors:
        return of_pytorch(x.double(), grad.double())

    def ours(x: Tensor, grad: Tensor) -> Tensors:
        return (grad_weight(grad, x, kernel, stride, padding),)

    products = 2.0 * images * out_side**2 * in_channels * out_channels * kernel**2
    elements = images * (in_channels * side**2 + out_channels * out_side**2)
    work = Work(flops=products, bytes=4 * float(elements))
    contenders = [
        Contender("scan-fast", ours, 1e-4, work, skipped=peers.no_kernel("convolution", device)),
        Contender("eager", of_pytorch, 1e-4),
    ]
    return Case(size, inputs, exact, contenders)


def _bfloat16(size: str, device: str) -> Case:
    images, in_channels, out_channels, side, kernel, stride = (int(part) for part in size.split("x"))
    padding = kernel // 2
    out_side = (side + 2 * padding - kernel) // stride + 1

    def inputs(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)

        def drawn(*shape: int) -> Tensor:
            values = torch.randn(shape, generator=generator)
            return values.to(device).contiguous(memory_format=torch.channels_last)

        x = drawn(images, in_channels, side, side).bfloat16().requires_grad_()
        weight = (drawn(out_channels, in_channels, kernel, kernel) / (in_channels * kernel**2) ** 0.5).requires_grad_()
        return x, weight, drawn(images, out_channels, out_side, out_side).bfloat16()

    def exact(x: Tensor, weight: Tensor, grad: Tensor) -> Tensors:
        leaves = x.detach().double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()
        y = F.conv2d(*leaves, stride=stride, padding=padding)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.double())

    def ours(x: Tensor, weight: Tensor, grad: Tensor) -> Tensors:
        y = conv2d(x, weight, stride, padding)
        return y.detach(), *torch.autograd.grad(y, (x, weight), grad)

    def eager(x: Tensor, weight: Tensor, grad: Tensor) -> Tensors:
        y = F.conv2d(x, weight.bfloat16(), stride=stride, padding=padding)
        return y.detach(), *torch.autograd.grad(y, (x, weight), grad)

    def eager_float32(x: Tensor, weight: Tensor, grad: Tensor) -> Tensors:
        leaves = x.detach().float().requires_grad_(), weight
        y = F.conv2d(*leaves, stride=stride, padding=padding)
        return y.detach(), *torch.autograd.grad(y, leaves, grad.float())

    products = 2.0 * images * out_side**2 * in_channels * out_channels * kernel**2
    elements = images * (in_channels * side**2 + out_channels * out_side**2)
    # x and grad_y are read twice, y and grad_x written. Taps that fall outside of the images count.
    unit = "tiles_bfloat16" if native.build_info().get("cpu_amx_bf16") else "gemm_bfloat16"
    work = Work(flops=3 * products, bytes=2 * 3 * float(elements), unit=unit)
    x, weight, _ = inputs(0)
    missing = peers.no_kernel("convolution", device)
    if not missing and not pays(x, weight, stride, padding):
        missing = "it needs AMX or AVX-512-BF16, and channels that are multiples of 32"
    contenders = [
        Contender("scan-fast", ours, 0.004, work, skipped=missing),
        Contender("eager", eager, 0.006),
        Contender("eager float32", eager_float32, 0.006),
    ]
    return Case(size, inputs, exact, contenders)


FAMILY = Family(
    name="convolution",
    title="Convolution forward and backward in bfloat16, weight gradient in float32",
    case=case,
    # The convolutions of a ResNet-18 for 32-pixel images, at the batch of a SCAN step.
    sizes={
        "cpu": (
            "128x64x64x32x3x1",
            "128x64x128x32x3x2",
            "128x128x128x16x3x1",
            "128x128x256x16x3x2",
            "128x256x256x8x3x1",
            "128x256x512x8x3x2",
            "128x512x512x4x3x1",
            "128x64x64x32x3x1-float32",
            "128x64x128x32x3x2-float32",
            "128x128x128x16x3x1-float32",
            "128x256x256x8x3x1-float32",
            "128x512x512x4x3x1-float32",
        ),
        "cuda": (),
    },
    quick_sizes=("32x32x64x4x3x1", "32x32x64x4x3x1-float32"),
    memory_sizes={"cpu": ("128x128x128x16x3x1",), "cuda": ()},
)

if __name__ == "__main__":
    main(FAMILY)
