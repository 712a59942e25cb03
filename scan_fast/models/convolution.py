"""Convolution that on a CPU uses faster algorithms than PyTorch's own.

In float32, on processors whose weight gradient in oneDNN is slow, it uses that of :mod:`scan_fast.ops.convolution`.
In bfloat16 with AMX or AVX-512-BF16, it uses the kernel of that module. If that does not serve, it computes the weight
gradient of convolutions with small output maps as one matrix product, patches times gradients, in a fifth of the time.
(Such a map is 4x4, in the last stage of a ResNet for 32-pixel images, which has most of its weights. There, oneDNN's
weight gradient runs at a tenth of the rate of a matrix product.)

A shortcut of few channels never reaches oneDNN with its stride, whose weight gradient then writes beyond its memory:
https://github.com/uxlfoundation/oneDNN/issues/6035.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..ops.convolution import conv2d, conv2d_fork, grad_weight, grad_weight_pays, pays

LARGEST_MAP = 16
"""Largest output map, in positions, for which the product is faster. At 8x8 both take the same time."""

BLOCK_CHANNELS = 16
"""Input channels that oneDNN computes at once, at most. With fewer of them it overruns in strided 1x1 convolutions."""

Pair = tuple[int, int]


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` without bias, groups or dilation, with the same parameters and results."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W')."""
        out: Tensor
        if self._overruns(x):
            # Without padding, a 1x1 convolution sees only the positions that its stride keeps.
            kept = x[..., :: self.stride[0], :: self.stride[1]]
            return F.conv2d(kept.contiguous(memory_format=torch.channels_last), self.weight)
        if _is_transformed():
            return super().forward(x)
        if not _in_bfloat16_on_cpu(x):
            if self._use_weight_gradient(x):
                out = _FloatConvolution.apply(x, self.weight, *self._geometry())
                return out
            return super().forward(x)
        if self._use_kernel(x):
            return conv2d(_images(x), self.weight, self.stride[0], int(self.padding[0]))
        if not (torch.is_grad_enabled() and self.weight.requires_grad):
            return super().forward(x)
        stride, padding = self._geometry()
        sizes = zip(x.shape[-2:], self.kernel_size, stride, padding, strict=True)
        height, width = ((size + 2 * pad - kernel) // step + 1 for size, kernel, step, pad in sizes)
        if height * width > LARGEST_MAP:
            return super().forward(x)
        out = _SmallMapConvolution.apply(x.bfloat16(), self.weight.bfloat16(), stride, padding)
        return out

    def fork(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the result of :meth:`forward`, and x itself for a shortcut around this layer."""
        if not _is_transformed() and _in_bfloat16_on_cpu(x) and self._use_kernel(x):
            return conv2d_fork(_images(x), self.weight, self.stride[0], int(self.padding[0]))
        return self(x), x

    def _geometry(self) -> tuple[Pair, Pair]:
        return (self.stride[0], self.stride[1]), (int(self.padding[0]), int(self.padding[1]))

    def _overruns(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and self.in_channels < BLOCK_CHANNELS
            and self.kernel_size == (1, 1)
            and self.stride != (1, 1)
            and self.padding == (0, 0)
        )

    def _use_weight_gradient(self, x: Tensor) -> bool:
        return (
            x.device.type == "cpu"
            and torch.is_grad_enabled()
            and self.weight.requires_grad
            and not torch.is_autocast_enabled("cpu")
            and self.stride[0] == self.stride[1]
            and self.padding[0] == self.padding[1]
            and x.is_contiguous(memory_format=torch.channels_last)
            and grad_weight_pays(x, self.weight)
        )

    def _use_kernel(self, x: Tensor) -> bool:
        return (
            self.stride[0] == self.stride[1]
            and self.padding[0] == self.padding[1]
            and pays(x, self.weight, self.stride[0], int(self.padding[0]))
        )


def _images(x: Tensor) -> Tensor:
    return x.bfloat16().contiguous(memory_format=torch.channels_last)


def _is_transformed() -> bool:
    """Return whether a transform of torch.func runs, such as vmap or jvp. Only PyTorch's convolution has its rules."""
    return not torch.compiler.is_compiling() and bool(torch._C._are_functorch_transforms_active())


def _in_bfloat16_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
    )


class _Convolution(torch.autograd.Function):
    """PyTorch's forward pass, and its gradients as far as a subclass does not have its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, stride=stride, padding=padding)


def _gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, of_weight: bool) -> tuple[Tensor | None, ...]:
    """Return PyTorch's gradients of x, if it needs one, and of the weights, if asked for."""
    if not (ctx.needs_input_grad[0] or of_weight):
        return None, None
    wanted = ctx.needs_input_grad[0], of_weight, False
    found: tuple[Tensor | None, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, None, ctx.stride, ctx.padding, (1, 1), False, (0, 0), 1, wanted
    )
    return found[:2]


class _FloatConvolution(_Convolution):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        # With create_graph this pass is differentiated in turn, which PyTorch's own gradients allow.
        ours = not torch.is_grad_enabled()
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, grad_w = _gradients(ctx, grad, x, weight, of_weight=not ours)
        if ours:
            grad_w = grad_weight(grad, x, weight.shape[2], ctx.stride[0], ctx.padding[0])
        return grad_x, grad_w, None, None


class _SmallMapConvolution(_Convolution):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None]:
        x, weight = ctx.saved_tensors
        grad_x, _ = _gradients(ctx, grad, x, weight, of_weight=False)
        rows = grad.permute(0, 2, 3, 1).flatten(0, 2)
        # The transposed copy costs less than it saves in the product.
        product = rows.t().contiguous() @ patches(x, weight.shape[-2:], ctx.stride, ctx.padding)
        grad_weight = product.unflatten(1, (*weight.shape[-2:], weight.shape[1])).permute(0, 3, 1, 2)
        return grad_x, grad_weight, None, None


def patches(x: Tensor, kernel: Pair | torch.Size, stride: Pair, padding: Pair) -> Tensor:
    """Return the input patches of (B, C, H, W) per output position: (B * H' * W', kernel height * kernel width * C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, padding[1], padding[1], padding[0], padding[0]))
    windows = padded.unfold(1, kernel[0], stride[0]).unfold(2, kernel[1], stride[1])  # (B, H', W', C, kernel)
    return windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 2)
