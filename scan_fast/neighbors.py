"""Exact nearest neighbours by similarity."""

from __future__ import annotations

from torch import Tensor

from .ops import neighbors as _neighbors
from .ops.native import Impl


def topk_neighbors(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    exclude_self: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the k most similar rows of ``x`` for every row of ``x``, or for every query. Exact, and deterministic.

    Similarities are dot products of the float32 rows (divided by their lengths for ``"cosine"``) rounded to float32;
    equal similarities are ordered by the smaller index. A row with a NaN or an infinite entry is never anyone's
    neighbour and has none itself.

    Args:
        x: (N, D) float32, bfloat16 or float16.
        k: neighbours per query, from 1 to the number of candidates: N, or N - 1 where self is excluded.
        queries: (Q, D), or None to search ``x`` against itself.
        metric: ``"cosine"`` or ``"dot"``.
        exclude_self: leave out row i for query i, by index (duplicates of it stay); without effect where ``queries``
            are given.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        similarity (Q, k) float32, descending, and index (Q, k) int64. A query with fewer than k candidates is filled
        up with index -1 and similarity -inf.

    Raises:
        ValueError: for a wrong shape, dtype, device, k, metric or impl.
    """
    return _neighbors.topk_neighbors(x, k, queries=queries, metric=metric, exclude_self=exclude_self, impl=impl)
