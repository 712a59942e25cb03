"""SCAN loss operator: argument checks, fake kernels for torch.compile, the choice of implementation, several processes.

The operators ``scan_fast::scan_loss``, ``scan_loss_forward`` and ``scan_loss_backward`` and their autograd are
registered by the compiled module (``csrc/scan_loss/scan_loss_op.cpp``).

Several processes need no further kernels. The backward pass takes the mean prediction and divides by the rows of this
rank. Given the mean of all rows, its result is the gradient of the sum of all ranks' losses: there are W times as many
rows, and the entropy counts W times.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, native, reference
from .collectives import mean_over_ranks, several_ranks
from .logits import check_logits

_DIMENSIONS = {2: "(B, C)", 3: "(H, B, C)"}
_ROW_STATS = 6  # kScanLossRowStats of csrc/scan_loss/scan_loss.h


def scan_loss(anchors: Tensor, neighbors: Tensor, entropy_weight: float, *, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`scan_fast.scan_loss`."""
    _check(anchors, neighbors, entropy_weight)
    if dispatch.use_native(impl, anchors, "scan_loss_forward", differentiable=True):
        return torch.ops.scan_fast.scan_loss.default(anchors, neighbors, entropy_weight)
    if anchors.ndim == 2:
        total, consistency, entropy = reference.scan_loss(anchors[None], neighbors[None], entropy_weight)
        return total[0], consistency[0], entropy[0]
    return reference.scan_loss(anchors, neighbors, entropy_weight)


def scan_loss_distributed(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float, *, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute this rank's share of the SCAN loss of all ranks' rows; see :class:`scan_fast.SCANLoss`.

    The consistency is that of this rank's rows, the entropy that of all, so the mean over the ranks of each is that of
    one process with all rows. The gradient is that of the sum of all ranks' losses, if the upstream gradient is the
    same on every rank. Communication: one sum of H * C numbers in the forward pass, nothing in the backward pass,
    with the kernels or without. Nothing waits for the device.

    Raises:
        ValueError: as :func:`scan_fast.scan_loss`.
    """
    if not several_ranks():
        return scan_loss(anchors, neighbors, entropy_weight, impl=impl)
    _check(anchors, neighbors, entropy_weight)
    if dispatch.use_native(impl, anchors, "scan_loss_forward", differentiable=True):
        results: tuple[Tensor, Tensor, Tensor] = _DistributedSCANLoss.apply(anchors, neighbors, float(entropy_weight))
        return results
    consistency, mean_prob = reference.scan_loss_means(anchors, neighbors)
    entropy = reference.scan_loss_entropy(mean_over_ranks(mean_prob))
    return consistency - entropy_weight * entropy, consistency, entropy


def _check(anchors: Tensor, neighbors: Tensor, entropy_weight: float) -> None:
    check_logits("anchors", anchors, "neighbors", neighbors, _DIMENSIONS)
    # Comparisons, because torch.compile cannot trace math.isfinite of a number that it keeps symbolic.
    if not -math.inf < entropy_weight < math.inf:
        raise ValueError(f"entropy_weight must be a finite number, got {entropy_weight}")


class _DistributedSCANLoss(torch.autograd.Function):
    """Autograd of this rank's share of the loss, with the compiled kernels."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, neighbors: Tensor, entropy_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        _, consistency, _, mean_prob, row_stats = torch.ops.scan_fast.scan_loss_forward(
            anchors, neighbors, entropy_weight
        )
        dist.all_reduce(mean_prob)
        mean_prob /= dist.get_world_size()
        entropy = reference.scan_loss_entropy(mean_prob)
        ctx.save_for_backward(anchors, neighbors, mean_prob, row_stats)
        ctx.entropy_weight = entropy_weight
        ctx.set_materialize_grads(False)
        return consistency - entropy_weight * entropy, consistency, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_consistency: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None]:
        grads = torch.ops.scan_fast.scan_loss_backward(
            grad_total, grad_consistency, grad_entropy, *ctx.saved_tensors, ctx.entropy_weight
        )
        needed = [grad if need else None for grad, need in zip(grads, ctx.needs_input_grad, strict=False)]
        return needed[0], needed[1], None


def _fake_forward(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_logits("anchors", anchors, "neighbors", neighbors, _DIMENSIONS)
    heads, (rows, classes) = anchors.shape[:-2], anchors.shape[-2:]

    def empty(*sizes: int) -> Tensor:
        return anchors.new_empty((*heads, *sizes), dtype=torch.float32)

    return empty(), empty(), empty(), empty(classes), empty(rows, _ROW_STATS)


def _fake_backward(
    grad_total: Tensor | None,
    grad_consistency: Tensor | None,
    grad_entropy: Tensor | None,
    anchors: Tensor,
    neighbors: Tensor,
    mean_prob: Tensor,
    row_stats: Tensor,
    entropy_weight: float,
) -> tuple[Tensor, Tensor]:
    return anchors.new_empty(anchors.shape), anchors.new_empty(anchors.shape)


if native.is_available():
    torch.library.register_fake("scan_fast::scan_loss_forward", _fake_forward)
    torch.library.register_fake("scan_fast::scan_loss_backward", _fake_backward)
