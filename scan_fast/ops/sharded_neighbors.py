"""Exact nearest neighbours among rows that are spread over the ranks of the default process group.

Queries stay on their rank, and blocks of rows pass round a ring. At step s a rank searches the block of rank - s, while
it sends that block to the next rank and receives another one from the rank before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from . import neighbors
from .agreement import gather_checked, require_same
from .collectives import several_ranks
from .dispatch import use_native

_QUERIES_PER_MERGE = 4096
_DEVICES = ("cpu", "cuda")
_LARGEST = 2**62
_Lists = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ShardedNeighbors:
    """Neighbours of this rank's queries, and what was sent to find them.

    Attributes:
        similarity: (q_r, k) float32, descending; -inf for missing neighbours.
        index: (q_r, k) int64 numbers among the rows of all ranks; -1 for missing neighbours.
        bytes_sent: bytes of rows that this rank sent to the next one.
    """

    similarity: Tensor
    index: Tensor
    bytes_sent: int


def sharded_topk_neighbors(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    exclude_self: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the k most similar of all ranks' rows for each of this rank's rows, or for each of its queries.

    Every rank calls this with its rows. The result equals, in every bit, that of :func:`scan_fast.topk_neighbors` for
    all rows in one process. (The reference implementation adds up float64 products in an order that may depend on the
    shape of a block. It gives the same bits unless a sum is within about 1e-15 of a rounding boundary of float32.)
    Without a process group, or with one process, it is that function.

    Memory: let n be the largest number of rows of a rank, about N / ranks, D the columns, b the bytes of an element and
    q the number of this rank's queries. Beyond ``x`` and ``queries``, a rank on the CPU needs at most the larger of

        n D b + 12 n k + 8 n (256 + 4 k) + s     its rows against themselves, while a block arrives
        2 n D b + 48 q k + s                     another block, while the next one arrives, and four lists per query

    bytes, with s the compiled kernel's packed rows, 2 n D or at most 4 n D bytes, and some MiB per thread. The lists of
    8 n (256 + 4 k) bytes are not made if they take more than 256 MiB and 16 n D bytes. For 16-bit inputs, copies in
    float32 come on top, 4 (n + q) D bytes. A tensor that is not contiguous is copied. On a GPU, the search of a block
    takes about 4 (n + q) D bytes and its lists (``csrc/neighbors/neighbors.h``). The reference takes copies in float64
    and the similarities of 1,024 queries. ``python -m benchmarks.sharded_search`` measures the peak.

    Traffic: each rank sends the rows of all ranks but the next one, (N - n) D b bytes if all have n rows, in ranks - 1
    messages, each of which is on its way while a block is searched. The host waits for the device only to read how many
    rows each rank has, and not even for that if the group has a backend for the CPU.

    Args:
        x: (n_r, D) float32, bfloat16, float16 or float64, this rank's part of the N rows of all ranks, which are
            numbered in the order of ranks. n_r may differ between ranks, and be 0.
        k: neighbours per query, from 1 to the number of candidates: N, or N - 1 if the row itself is excluded.
        queries: (q_r, D) this rank's queries, of the dtype of ``x``; q_r may be 0. None for the rows of ``x``.
        metric: ``"cosine"`` or ``"dot"``.
        exclude_self: leave out a row for itself, by number; duplicates of it stay. Has no effect with ``queries``.
        impl: ``"auto"``, ``"native"`` or ``"reference"``.

    Returns:
        ``(similarity, index)``: (q_r, k) float32 in descending order, equal ones by ascending number, and (q_r, k)
        int64 numbers among the N rows. A query with fewer than k candidates is filled up with -inf and -1.

    Raises:
        ValueError: for a wrong shape, dtype, device, k, metric or impl, or if ranks disagree about the columns, dtype,
            kind of device, k, metric, exclude_self or whether there are queries. If one rank's arguments are wrong,
            every rank raises the same error, which names that rank.
    """
    result = sharded_search(x, k, queries=queries, metric=metric, exclude_self=exclude_self, impl=impl)
    return result.similarity, result.index


def sharded_search(
    x: Tensor,
    k: int,
    *,
    queries: Tensor | None = None,
    metric: str = "cosine",
    exclude_self: bool = True,
    impl: str = "auto",
) -> ShardedNeighbors:
    """Search like :func:`sharded_topk_neighbors`, and also return how many bytes were sent."""
    if not several_ranks():
        found = neighbors.search(x, k, queries=queries, metric=metric, exclude_self=exclude_self, impl=impl)
        return ShardedNeighbors(found.similarity, found.index, 0)
    counts = _rows_by_rank(x, k, queries, metric, exclude_self, impl)
    rank, ranks = dist.get_rank(), len(counts)
    own = x.detach().contiguous()
    wanted = own if queries is None else queries.detach().contiguous()

    def lists_of(block: int, rows: Tensor) -> _Lists | None:
        """Return the neighbours among the rows of one rank, or None if there is no candidate or no query."""
        itself = block == rank and queries is None
        candidates = len(rows) - int(itself and exclude_self)
        if candidates < 1 or len(wanted) == 0:
            return None
        found = neighbors.search(
            rows,
            min(k, candidates),
            queries=None if itself else wanted,
            metric=metric,
            exclude_self=exclude_self,
            impl=impl,
        )
        found.index.add_((found.index >= 0) * sum(counts[:block]))
        return found.similarity, found.index

    ring = _Ring(own, counts)
    present = own
    # Blocks come in descending order, first from the own one to block 0 and then from the last one on. So within each
    # of these halves, the lists of a block go in front of those before it.
    lower: _Lists | None = None
    upper: _Lists | None = None
    for step in range(ranks):
        block = (rank - step) % ranks
        incoming = ring.start(present, step)
        if block <= rank:
            lower = _merged(lists_of(block, present), lower, k)
        else:
            upper = _merged(lists_of(block, present), upper, k)
        ring.wait()
        present = incoming
    lists = _merged(lower, upper, k)
    if lists is None:
        shape = (0, k)
        lists = wanted.new_empty(shape, dtype=torch.float32), wanted.new_empty(shape, dtype=torch.int64)
    return ShardedNeighbors(*lists, ring.bytes_sent)


def _merged(first: _Lists | None, second: _Lists | None, k: int) -> _Lists | None:
    """Return the k best of two lists per query, (Q, at most k) each. Among equals, those of the first lists go first.

    A missing neighbour has similarity -inf, which no neighbour has, so it goes last.
    """
    if first is None or second is None:
        return second if first is None else first
    columns = min(k, first[0].shape[1] + second[0].shape[1])
    similarity, index = (x.new_empty((len(x), columns)) for x in first)
    for start in range(0, len(similarity), _QUERIES_PER_MERGE):
        rows = slice(start, start + _QUERIES_PER_MERGE)
        value, order = torch.cat([first[0][rows], second[0][rows]], 1).sort(dim=1, descending=True, stable=True)
        similarity[rows] = value[:, :columns]
        index[rows] = torch.cat([first[1][rows], second[1][rows]], 1).gather(1, order[:, :columns])
    return similarity, index


class _Ring:
    """Passes blocks on to the next rank, each while it is searched."""

    def __init__(self, own: Tensor, counts: Sequence[int]) -> None:
        self.rank, self.ranks, self.counts = dist.get_rank(), len(counts), counts
        # One buffer is searched while the other one fills.
        self.buffers = [own.new_empty((max(counts), own.shape[1])) for _ in range(min(2, self.ranks - 1))]
        self.bytes_sent = 0
        self.pending: list[dist.Work] = []
        if 0 in counts:
            # All ranks have to take part in the first communication of some backends, and empty blocks are not sent.
            dist.all_reduce(own.new_zeros(1, dtype=torch.int64))

    def start(self, present: Tensor, step: int) -> Tensor:
        """Start to send a block on and to receive the next one. Return where it arrives; after the last step, nothing.

        A buffer is used again two steps later, when its block has been sent and searched.
        """
        if step == self.ranks - 1:
            return present[:0]
        incoming = self.buffers[step % 2][: self.counts[(self.rank - step - 1) % self.ranks]]
        operations = []
        if len(present):
            operations.append(dist.P2POp(dist.isend, present, (self.rank + 1) % self.ranks))
            self.bytes_sent += present.numel() * present.element_size()
        if len(incoming):
            operations.append(dist.P2POp(dist.irecv, incoming, (self.rank - 1) % self.ranks))
        self.pending = dist.batch_isend_irecv(operations) if operations else []
        return incoming

    def wait(self) -> None:
        """Wait until the block has been sent and the next one is here; on a GPU, its stream waits and not the host."""
        for work in self.pending:
            work.wait()
        self.pending = []


def _rows_by_rank(x: Tensor, k: int, queries: Tensor | None, metric: str, exclude_self: bool, impl: str) -> list[int]:
    """Check the arguments of all ranks together and return how many rows each has."""
    names = ("number of columns of x", "dtype", "kind of device", "k", "metric", "exclude_self", "queries")
    numbers, fault = [0] * (1 + len(names)), None
    try:
        neighbors.check_arguments(x, k, queries, metric)
        if x.device.type not in _DEVICES:
            raise ValueError(f"x must be on a CPU or a CUDA device, got {x.device}")
        use_native(impl, x, "topk_neighbors")
        numbers = [
            len(x),
            x.shape[1],
            neighbors.DTYPES.index(x.dtype),
            _DEVICES.index(x.device.type),
            max(-1, min(int(k), _LARGEST)),
            neighbors.METRICS.index(metric),
            bool(exclude_self),
            queries is not None,
        ]
    except (ValueError, TypeError, RuntimeError) as error:
        fault = str(error)
    # By the kind of number, those of all ranks.
    counts, columns, dtypes, devices, ks, metrics, excluded, given = zip(*gather_checked(numbers, fault), strict=True)
    words: tuple[Sequence[object], ...] = (
        columns,
        [neighbors.DTYPES[dtype] for dtype in dtypes],
        [_DEVICES[device] for device in devices],
        ks,
        [neighbors.METRICS[metric] for metric in metrics],
        [bool(excludes) for excludes in excluded],
        ["queries" if has_queries else "queries=None" for has_queries in given],
    )
    require_same(dict(zip(names, words, strict=True)))
    if sum(counts) < 1:
        raise ValueError("x must have at least one row on one of the ranks, got none")
    neighbors.check_k(ks[0], sum(counts) - int(excluded[0] and not given[0]))
    return list(counts)
