"""Top-k neighbour operator: argument checks, its fake kernel, and the choice of implementation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import reference
from .dispatch import use_native
from .native import is_available

METRICS = ("cosine", "dot")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class NeighborResult:
    """Neighbours, and how many queries needed further searches.

    Attributes:
        similarity: (Q, k) float32, descending; -inf for missing neighbours.
        index: (Q, k) int64; -1 for missing neighbours.
        searched_again: int64 scalar: number of queries that the first search could not decide, because of many
            duplicates or near ties, and that were searched again with finer products. They cost time, not exactness.
            Zero if most rows are neighbours, and for the reference, which searches once, in float64.
        searched_exactly: int64 scalar: number of those that only brute force in float64 could decide.
    """

    similarity: Tensor
    index: Tensor
    searched_again: Tensor
    searched_exactly: Tensor


def check_arguments(x: Tensor, k: int, queries: Tensor | None, metric: str) -> None:
    """Raise a ValueError for arguments that are wrong for any number of rows."""
    for name, tensor in (("x", x), ("queries", queries)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise ValueError(f"{name} must have two dimensions (rows, features), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if x.shape[1] < 1:
        raise ValueError(f"x must have at least one column, got shape {tuple(x.shape)}")
    if queries is not None:
        if queries.shape[1] != x.shape[1]:
            raise ValueError(f"queries must have {x.shape[1]} columns like x, got shape {tuple(queries.shape)}")
        if queries.dtype != x.dtype:
            raise ValueError(f"queries must have the dtype of x, {x.dtype}, got {queries.dtype}")
        if queries.device != x.device:
            raise ValueError(f"queries must be on the device of x, {x.device}, got {queries.device}")
    if metric not in METRICS:
        raise ValueError(f'metric must be "cosine" or "dot", got {metric!r}')
    if isinstance(k, bool) or not isinstance(k, int | torch.SymInt):
        raise ValueError(f"k must be an integer, got {k!r}")


def check_k(k: int, candidates: int) -> None:
    """Raise a ValueError if there are fewer than k candidates."""
    if k < 1 or k > candidates:
        raise ValueError(f"k must be from 1 to the number of candidates, {candidates}, got {k}")


def search(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    exclude_self: bool = True,
    impl: str = "auto",
) -> NeighborResult:
    """Search like :func:`scan_fast.topk_neighbors`, and also return how many queries needed further searches.

    Args:
        x: (N, D) float32, bfloat16 or float16 (float64 through the reference).
        k: neighbours per query, from 1 to the number of candidates.
        queries: (Q, D), or None to search ``x`` against itself.
        metric: ``"cosine"`` or ``"dot"``.
        exclude_self: exclude row i for query i; has no effect if ``queries`` is given.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        The neighbours, detached: similarities carry no gradient.

    Raises:
        ValueError: for a wrong shape, dtype, device, k, metric or impl.
    """
    check_arguments(x, k, queries, metric)
    if x.shape[0] < 1:
        raise ValueError(f"x must have at least one row, got shape {tuple(x.shape)}")
    exclude_self = exclude_self and queries is None
    check_k(k, x.shape[0] - int(exclude_self))
    database = x.detach()
    wanted = database if queries is None else queries.detach()
    normalize = metric == "cosine"
    if use_native(impl, database, "topk_neighbors"):
        operator = torch.ops.scan_fast.topk_neighbors
        similarity, index, searched = operator(wanted, database, k, normalize, exclude_self)
        return NeighborResult(similarity, index, searched[0], searched[1])
    similarity, index = reference.topk_neighbors(wanted, database, k, normalize, exclude_self)
    return NeighborResult(similarity, index, index.new_zeros(()), index.new_zeros(()))


def topk_neighbors(
    x: Tensor, k: int, *, queries: Tensor | None, metric: str, exclude_self: bool, impl: str
) -> tuple[Tensor, Tensor]:
    """See :func:`scan_fast.topk_neighbors`."""
    result = search(x, k, queries=queries, metric=metric, exclude_self=exclude_self, impl=impl)
    return result.similarity, result.index


if is_available():

    @torch.library.register_fake("scan_fast::topk_neighbors")
    def _(
        queries: Tensor, database: Tensor, k: int, normalize: bool, exclude_self: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        check_arguments(database, k, queries, "cosine")
        shape = (queries.shape[0], k)
        return (
            queries.new_empty(shape, dtype=torch.float32),
            queries.new_empty(shape, dtype=torch.int64),
            queries.new_empty((2,), dtype=torch.int64),
        )
