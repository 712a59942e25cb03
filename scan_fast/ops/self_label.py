"""Self-label loss operator: argument checks, fake kernels for torch.compile, implementations, several processes.

The operators ``scan_fast::self_label``, ``self_label_forward`` and ``self_label_backward`` and their autograd are
registered by the compiled module (``csrc/self_label/self_label_op.cpp``).

With several processes the weight of an image depends on the confident images of all ranks. The forward kernel finds
those of this rank, the ranks add their numbers by class, and the backward kernel takes the weights that follow. The
forward kernel's loss has this rank's weights in it, so the cross-entropies are computed once more, in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, native, reference
from .collectives import several_ranks
from .logits import check_logits

_DIMENSIONS = {2: "(B, C)"}
_ROW_STATS = 2  # kSelfLabelRowStats of csrc/self_label/self_label.h


def self_label_loss(
    weak: Tensor, strong: Tensor, threshold: float, *, balance: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """See :func:`scan_fast.self_label_loss`."""
    _check(weak, strong, threshold)
    if dispatch.use_native(impl, weak, "self_label_forward", differentiable=True):
        return torch.ops.scan_fast.self_label.default(weak, strong, threshold, balance)
    return reference.self_label_loss(weak, strong, threshold, balance)


def self_label_loss_distributed(
    weak: Tensor, strong: Tensor, threshold: float, *, balance: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """Compute this rank's share of the self-label loss of all ranks' rows; see :class:`scan_fast.SelfLabelLoss`.

    The share is the sum over this rank's rows times the number of ranks, so that the mean over the ranks is the loss of
    one process with all rows. The gradient is that of the sum of all ranks' losses. Communication: one sum of C numbers
    in the forward pass, nothing in the backward pass, with the kernels or without. Nothing waits for the device.

    Returns:
        The loss, and the number of confident rows of this rank, int64: the mean of the ranks' shares of confident rows
        is that of all rows.

    Raises:
        ValueError: as :func:`scan_fast.self_label_loss`.
    """
    if not several_ranks():
        return self_label_loss(weak, strong, threshold, balance=balance, impl=impl)
    _check(weak, strong, threshold)
    if dispatch.use_native(impl, weak, "self_label_forward", differentiable=True):
        results: tuple[Tensor, Tensor] = _DistributedSelfLabel.apply(weak.detach(), strong, float(threshold), balance)
        return results
    confident, target = reference.confident_rows(weak, threshold)
    weight = _class_weights(confident, target, weak.shape[1], balance, strong.dtype)
    return reference.self_label_sum(strong, confident, target, weight), confident.sum()


def _check(weak: Tensor, strong: Tensor, threshold: float) -> None:
    check_logits("weak", weak, "strong", strong, _DIMENSIONS)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")


def _class_weights(confident: Tensor, target: Tensor, classes: int, balance: bool, dtype: torch.dtype) -> Tensor:
    """Return the weight of a confident row of each class, (C,), by the confident rows of all ranks."""
    counts = reference.confident_per_class(confident, target, classes)
    dist.all_reduce(counts)
    weights = reference.self_label_weights(counts.double() if dtype == torch.float64 else counts, balance)
    return weights * dist.get_world_size()


class _DistributedSelfLabel(torch.autograd.Function):
    """Autograd of this rank's share of the loss, with the compiled kernels."""

    @staticmethod
    def forward(ctx: Any, weak: Tensor, strong: Tensor, threshold: float, balance: bool) -> tuple[Tensor, Tensor]:
        _, n_confident, target, row_weight, row_stats = torch.ops.scan_fast.self_label_forward(
            weak, strong, threshold, balance
        )
        confident, labels = row_weight > 0, target.long()
        weights = _class_weights(confident, labels, weak.shape[1], balance, strong.dtype)
        ctx.save_for_backward(strong, target, weights[labels] * confident, row_stats)
        ctx.mark_non_differentiable(n_confident)
        return reference.self_label_sum(strong, confident, labels, weights), n_confident

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[None, Tensor, None, None]:
        return None, torch.ops.scan_fast.self_label_backward(grad_loss, *ctx.saved_tensors), None, None


def _fake_forward(
    weak: Tensor, strong: Tensor, threshold: float, balance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_logits("weak", weak, "strong", strong, _DIMENSIONS)
    rows = weak.shape[0]
    return (
        weak.new_empty((), dtype=torch.float32),
        weak.new_empty((), dtype=torch.int64),
        weak.new_empty((rows,), dtype=torch.int32),
        weak.new_empty((rows,), dtype=torch.float32),
        weak.new_empty((rows, _ROW_STATS), dtype=torch.float32),
    )


def _fake_backward(grad_loss: Tensor, strong: Tensor, target: Tensor, row_weight: Tensor, row_stats: Tensor) -> Tensor:
    return strong.new_empty(strong.shape)


if native.is_available():
    torch.library.register_fake("scan_fast::self_label_forward", _fake_forward)
    torch.library.register_fake("scan_fast::self_label_backward", _fake_backward)
