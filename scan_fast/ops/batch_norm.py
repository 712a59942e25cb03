"""Batch normalisation, addition of a residual and ReLU as one operator.

The operators ``scan_fast::batch_norm``, ``batch_norm_forward`` and ``batch_norm_backward`` and their autograd are
registered by the compiled module (``csrc/batch_norm/batch_norm_op.cpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, native, reference
from .dispatch import Impl


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    relu: bool = True,
    impl: Impl = "auto",
) -> Tensor:
    """Normalise each channel of a batch of images, add a residual, and apply ReLU (arXiv 1502.03167, 1512.03385).

    Statistics and sums are float32 (combined in float64) for every dtype of ``x``.

    Args:
        x: (N, C, H, W) float32, bfloat16 or float16; the kernel requires channels-last layout.
        weight, bias: (C,) float32.
        running_mean, running_var: (C,) float32, updated in place in training; may both be None in training.
        residual: of the shape and dtype of ``x``, added after the normalisation.
        training: normalise with the statistics of the batch instead of the running ones.
        momentum: weight of the batch in the running statistics, which use the unbiased variance.
        eps: added to the variance.
        relu: apply ReLU last.
        impl: "auto", "native" or "reference"; "auto" uses the kernel for channels-last inputs if there is one.

    Returns:
        (N, C, H, W) of the dtype and layout of ``x``.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or fewer than two values per channel in training.
    """
    if impl != "reference" and _use_kernel(impl, x, residual, weight):
        return torch.ops.scan_fast.batch_norm.default(
            x, residual, weight, bias, running_mean, running_var, training, momentum, eps, relu
        )
    return reference.batch_norm(
        x, residual, weight, bias, running_mean, running_var, training=training, momentum=momentum, eps=eps, relu=relu
    )


def _use_kernel(impl: Impl, x: Tensor, residual: Tensor | None, weight: Tensor) -> bool:
    if impl == "native":
        return dispatch.use_native(impl, x, "batch_norm_forward", differentiable=True)
    # torch.compile fuses the plain operators by itself. The kernel requires its operands in this layout. use_native
    # comes last, because it may run a self-test.
    return (
        not torch.compiler.is_compiling()
        and x.ndim == 4
        and x.numel() > 0
        and weight.dtype == torch.float32
        and all(
            t.is_contiguous(memory_format=torch.channels_last) and t.dtype == x.dtype and t.shape == x.shape
            for t in (x, residual)
            if t is not None
        )
        and dispatch.use_native(impl, x, "batch_norm_forward", differentiable=True)
    )


def _fake_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
    keep_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.ndim != 4:
        raise ValueError(f"x must be (N, C, H, W), got shape {tuple(x.shape)}")
    batch, channels, height, width = x.shape
    words = batch * height * width * ((channels + 15) // 16) if keep_mask else 0
    mean = x.new_empty(channels, dtype=torch.float32)
    return torch.empty_like(x), mean, torch.empty_like(mean), x.new_empty(words, dtype=torch.int16)


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    inv_std: Tensor,
    mask: Tensor,
    training: bool,
    relu: bool,
    with_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_residual = torch.empty_like(x) if with_residual else x.new_empty(0)
    return torch.empty_like(x), grad_residual, torch.empty_like(mean), torch.empty_like(mean)


if native.is_available():
    torch.library.register_fake("scan_fast::batch_norm_forward", _fake_forward)
    torch.library.register_fake("scan_fast::batch_norm_backward", _fake_backward)
