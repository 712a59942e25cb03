"""Self-label loss (interim: reference only)."""

from __future__ import annotations

from torch import Tensor

from . import reference


def self_label_loss(
    weak: Tensor, strong: Tensor, threshold: float, *, balance: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """See :func:`scan_fast.self_label_loss`."""
    return reference.self_label_loss(weak, strong, threshold, balance)
