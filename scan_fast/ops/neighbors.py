"""Top-k neighbours (interim: reference only)."""

from __future__ import annotations

from torch import Tensor

from . import reference


def topk_neighbors(
    x: Tensor, k: int, *, queries: Tensor | None, metric: str, exclude_self: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """See :func:`scan_fast.topk_neighbors`."""
    q = x if queries is None else queries
    return reference.topk_neighbors(q, x, k, metric == "cosine", exclude_self and queries is None)
