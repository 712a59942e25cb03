"""SCAN loss operator: argument checks, fake kernels for torch.compile, and the choice of implementation.

The operators ``scan_fast::scan_loss``, ``scan_loss_forward`` and ``scan_loss_backward`` and their autograd are
registered by the compiled module (``csrc/scan_loss/scan_loss_op.cpp``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import dispatch, native, reference
from .logits import check_logits

_DIMENSIONS = {2: "(B, C)", 3: "(H, B, C)"}
_ROW_STATS = 6  # kScanLossRowStats of csrc/scan_loss/scan_loss.h


def scan_loss(anchors: Tensor, neighbors: Tensor, entropy_weight: float, *, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`scan_fast.scan_loss`."""
    check_logits("anchors", anchors, "neighbors", neighbors, _DIMENSIONS)
    # Comparisons, because torch.compile cannot trace math.isfinite of a number that it keeps symbolic.
    if not -math.inf < entropy_weight < math.inf:
        raise ValueError(f"entropy_weight must be a finite number, got {entropy_weight}")
    if dispatch.use_native(impl, anchors, "scan_loss_forward", differentiable=True):
        return torch.ops.scan_fast.scan_loss.default(anchors, neighbors, entropy_weight)
    if anchors.ndim == 2:
        total, consistency, entropy = reference.scan_loss(anchors[None], neighbors[None], entropy_weight)
        return total[0], consistency[0], entropy[0]
    return reference.scan_loss(anchors, neighbors, entropy_weight)


def _fake_forward(
    anchors: Tensor, neighbors: Tensor, entropy_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
