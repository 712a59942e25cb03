"""NT-Xent (interim: reference only)."""

from __future__ import annotations

from torch import Tensor

from . import reference


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, *, anchors: str, reduction: str, impl: str) -> Tensor:
    """See :func:`scan_fast.nt_xent`."""
    losses = reference.nt_xent(z0, z1, temperature, anchors == "both")
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def nt_xent_distributed(z0: Tensor, z1: Tensor, temperature: float, *, anchors: str, impl: str) -> Tensor:
    """See :class:`scan_fast.NTXentLoss`."""
    raise NotImplementedError
