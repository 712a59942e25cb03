"""Self-label loss operator: argument checks, fake kernels for torch.compile, and the choice of implementation.

The operators ``scan_fast::self_label``, ``self_label_forward`` and ``self_label_backward`` and their autograd are
registered by the compiled module (``csrc/self_label/self_label_op.cpp``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch, native, reference
from .logits import check_logits

_DIMENSIONS = {2: "(B, C)"}
_ROW_STATS = 2  # kSelfLabelRowStats of csrc/self_label/self_label.h


def self_label_loss(
    weak: Tensor, strong: Tensor, threshold: float, *, balance: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """See :func:`scan_fast.self_label_loss`."""
    check_logits("weak", weak, "strong", strong, _DIMENSIONS)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    if dispatch.use_native(impl, weak, "self_label_forward", differentiable=True):
        return torch.ops.scan_fast.self_label.default(weak, strong, threshold, balance)
    return reference.self_label_loss(weak, strong, threshold, balance)


def _fake_forward(
    weak: Tensor, strong: Tensor, threshold: float, balance: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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
