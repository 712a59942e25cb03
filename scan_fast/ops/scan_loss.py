"""SCAN loss (interim: reference only)."""

from __future__ import annotations

from torch import Tensor

from . import reference


def scan_loss(anchors: Tensor, neighbors: Tensor, entropy_weight: float, *, impl: str) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`scan_fast.scan_loss`."""
    if anchors.ndim == 2:
        total, cons, ent = reference.scan_loss(anchors[None], neighbors[None], entropy_weight)
        return total[0], cons[0], ent[0]
    return reference.scan_loss(anchors, neighbors, entropy_weight)
