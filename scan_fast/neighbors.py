"""Search for exact nearest neighbours by similarity."""

from __future__ import annotations

from torch import Tensor

from .ops import neighbors as _neighbors
from .ops.dispatch import Impl


def topk_neighbors(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    exclude_self: bool = True,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the k most similar rows of ``x`` for every row of ``x``, or for every query.

    The search is exact and deterministic. A similarity is the dot product of two float32 rows (divided by their lengths
    for ``"cosine"``), rounded to float32; equal similarities are ordered by the smaller index. A row with a NaN or an
    infinite entry is a neighbour of no other row and has no neighbours.

    Args:
        x: (N, D) float32, bfloat16 or float16.
        k: Neighbours per query, from 1 to the number of candidates: N, or N - 1 if the row itself is excluded.
        queries: (Q, D) of the dtype of ``x``, or None to search ``x`` against itself.
        metric: ``"cosine"`` or ``"dot"``.
        exclude_self: Leave out row i for query i, by index; duplicates of it stay. Has no effect with ``queries``.
        impl: ``"auto"``, ``"native"`` (the compiled kernel) or ``"reference"`` (plain PyTorch).

    Returns:
        ``(similarity, index)``: (Q, k) float32 in descending order, and (Q, k) int64. A query with fewer than k
        candidates is filled up with similarity -inf and index -1.

    Raises:
        ValueError: For a wrong shape, dtype, device, k, metric or impl.

    Example:
        >>> similarity, index = topk_neighbors(torch.randn(100, 64), k=20)
    """
    return _neighbors.topk_neighbors(x, k, queries=queries, metric=metric, exclude_self=exclude_self, impl=impl)
