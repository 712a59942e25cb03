"""Batch normalisation in training with the statistics of all ranks, and the addition of a residual and ReLU with it.

torch.nn.SyncBatchNorm takes GPU tensors only, and knows neither residual nor ReLU. This one runs on any device, and its
passes over an image batch are those of the compiled kernel if there is one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd.function import once_differentiable

from .batch_norm import _use_kernel, batch_norm
from .collectives import several_ranks
from .dispatch import IMPLEMENTATIONS, Impl

_CHUNK = 2**18
"""Elements that a processor computes on at a time: they stay in its cache, and their float32 sums keep their digits."""


def sync_batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Normalise each channel with the mean and variance of the rows of all ranks, add a residual, and apply ReLU.

    Every rank of the default process group must call it. The gradient of ``x`` is that of the sum of all ranks' losses.
    The gradients of ``weight`` and ``bias`` are those of this rank's loss: DistributedDataParallel averages them, as it
    does for every parameter. Without a process group, or with one rank, this is
    :func:`scan_fast.ops.batch_norm.batch_norm` in training.

    The forward pass sums 2C + 1 float64 numbers over the ranks, the backward pass 2C.

    Args:
        x: (N, C, ...) float32, bfloat16, float16 or float64. N may differ between ranks and may be 0; C may not.
        weight, bias: (C,).
        running_mean, running_var: (C,), updated in place with the mean and the unbiased variance of all rows; or both
            None.
        residual: of the shape of ``x``, added after the normalisation.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        relu: apply ReLU last.
        impl: "auto", "native" or "reference"; "auto" uses the kernel for channels-last images if there is one. Ranks
            may differ in it.

    Returns:
        (N, C, ...) of the dtype of ``x``.

    Raises:
        ValueError: for shapes or dtypes that do not fit, or, on a processor, if all ranks together hold fewer than two
            values per channel. A GPU does not wait for that number.
    """
    if not several_ranks():
        return batch_norm(
            *(x, weight, bias, running_mean, running_var),
            residual=residual,
            training=True,
            momentum=momentum,
            eps=eps,
            relu=relu,
            impl=impl,
        )
    return _over_ranks(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu, impl)


# As torch.compiler.disable does, which would import the compiler with this module: a compiled network calls this as it
# is, for a trace holds no collectives that change their argument.
@_disable_dynamo
def _over_ranks(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    relu: bool,
    impl: Impl,
) -> Tensor:
    _check(x, weight, bias, running_mean, running_var, residual, impl)
    kernel = impl != "reference" and _use_kernel(impl, x, residual, weight)
    y: Tensor = _SyncBatchNorm.apply(x, residual, weight, bias, running_mean, running_var, momentum, eps, relu, kernel)
    return y


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    impl: str,
) -> None:
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl must be "auto", "native" or "reference", got {impl!r}')
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(f"x must be (N, C, ...) of a floating-point dtype, got shape {tuple(x.shape)} of {x.dtype}")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var must both be given, or neither")
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(
                f"{name} must be ({x.shape[1]},), as x has {x.shape[1]} channels; got {tuple(vector.shape)}"
            )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


class _SyncBatchNorm(torch.autograd.Function):
    """The operators for evaluation, given the statistics of all ranks, and what the statistics add to the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        relu: bool,
        kernel: bool,
    ) -> Tensor:
        moments = _moments(x, kernel)
        dist.all_reduce(moments)
        count = moments[-1]
        if count.device.type == "cpu" and count < 2:
            raise ValueError(
                f"training needs more than one value per channel; all ranks together have {int(count)}, "
                f"and this one has x of shape {tuple(x.shape)}"
            )
        mean64, square = (moments[:-1] / count).view(2, -1)
        var64 = (square - mean64.square()).clamp_min_(0)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean64.to(running_mean.dtype), momentum)
            unbiased = var64 * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        dtype = _statistics_dtype(x)
        mean, var = mean64.to(dtype), var64.to(dtype)
        if kernel:
            keep_mask = relu and residual is not None
            y, _, inv_std, mask = torch.ops.scan_fast.batch_norm_forward.default(
                x, residual, weight, bias, mean, var, False, momentum, eps, relu, keep_mask
            )
        else:
            y = F.batch_norm(x, mean, var, weight.to(dtype), bias.to(dtype), False, 0.0, eps)
            y = y if residual is None else y + residual
            y = F.relu(y) if relu else y
            inv_std = (var + eps).rsqrt()
            mask = y if relu else None
        # The kernel reads the sign of the ReLU's input from the mask, or computes it from the other tensors.
        ctx.save_for_backward(x, weight, bias, mean, var, inv_std, mask, count)
        ctx.eps, ctx.relu, ctx.kernel = eps, relu, kernel
        ctx.residual_dtype = None if residual is None else residual.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, var, inv_std, mask, count = ctx.saved_tensors
        grad_residual = None
        if ctx.kernel:
            grad_y = grad_y.to(x.dtype).contiguous(memory_format=torch.channels_last)
            grad_x, grad_residual, grad_weight, grad_bias = torch.ops.scan_fast.batch_norm_backward.default(
                *(grad_y, x, weight, bias, mean, inv_std, mask), False, ctx.relu, ctx.residual_dtype is not None
            )
            scale = weight
        else:
            scale = weight.to(mean.dtype)
            if ctx.relu:
                grad_y = torch.ops.aten.threshold_backward.default(grad_y, mask, 0)
            if ctx.residual_dtype is not None:
                grad_residual = grad_y.to(ctx.residual_dtype)
            grad_x, grad_weight, grad_bias = _plain_backward(grad_y.to(x.dtype), x, scale, mean, var, ctx.eps)
        if ctx.needs_input_grad[0]:
            sums = torch.stack((grad_bias, grad_weight)).double()
            dist.all_reduce(sums)
            sums *= scale * inv_std / count
            _subtract(grad_x, x, mean, sums[0].to(mean.dtype), (sums[1] * inv_std).to(mean.dtype))
        else:
            grad_x = None
        if ctx.residual_dtype is None:
            grad_residual = None
        return grad_x, grad_residual, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), *[None] * 6


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Return parts of the batch, each of whole images. A GPU takes all at once."""
    if x.device.type != "cpu":
        return (x,)
    return x.split(max(1, _CHUNK // max(1, x[:1].numel())))


def _moments(x: Tensor, kernel: bool) -> Tensor:
    """Return the sums of the values and of their squares per channel, and their number, (2C + 1,) float64.

    The squares' are made of means and variances, so that a small variance keeps its digits beside a large mean.
    """
    channels = x.shape[1]
    total = x.new_zeros(2 * channels + 1, dtype=torch.float64)
    if x.numel() == 0:
        return total
    for part in _chunks(x):
        count = part.numel() // channels
        if x.device.type != "cpu":
            # The kernel would write the whole batch once more.
            mean, var = (t.double() for t in torch.batch_norm_update_stats(part, None, None, 0.0))
        elif kernel and count > 1:
            mean, var = _kernel_statistics(part)
        else:
            mean, var = _plain_statistics(part)
        total += torch.cat((mean, var + mean.square(), mean.new_ones(1))) * count
    return total


def _kernel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance, (C,) float64, of a batch that is small enough to be normalised for nothing."""
    weight = x.new_ones(x.shape[1], dtype=torch.float32)
    _, mean, inv_std, _ = torch.ops.scan_fast.batch_norm_forward.default(
        x, None, weight, weight, None, None, True, 0.0, 0.0, False, False
    )
    return mean.double(), inv_std.double().pow(-2)


def _plain_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and variance, (C,) float64, of a batch that is small enough to be copied."""
    # PyTorch's sums of float32 lose digits beside a large mean. The mean of the first image takes most of it away.
    shift = x[0].to(_statistics_dtype(x)).reshape(x.shape[1], -1).mean(1)
    mean, var = torch.batch_norm_update_stats(x - shift.view(-1, *[1] * (x.ndim - 2)), None, None, 0.0)
    return mean.double() + shift, var.double()


def _plain_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias for given statistics."""
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.native_batch_norm_backward.default(
        grad_y, x, weight, mean, var, None, None, False, eps, [True, True, True]
    )
    return gradients


def _subtract(grad_x: Tensor, x: Tensor, mean: Tensor, offset: Tensor, slope: Tensor) -> None:
    """Subtract offset + slope * (x - mean), which is float32, from ``grad_x`` in place, with one rounding."""
    if x.numel() == 0:
        return
    mean, offset, slope = (t.view(-1, *[1] * (x.ndim - 2)) for t in (mean, offset, slope))
    for gradient, part in zip(_chunks(grad_x), _chunks(x), strict=True):
        correction = part - mean
        gradient.sub_(torch.addcmul(offset, correction, slope, out=correction))
