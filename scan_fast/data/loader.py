"""Batches of an epoch in random order, and threads that compute results in advance."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from torch import Tensor

from ..random import Key, permutation
from .order import epoch_order

S = TypeVar("S")
T = TypeVar("T")


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches that :func:`epoch_batches` yields for n samples."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return max(n // batch_size, min(n, 1)) if drop_last else -(-n // batch_size)


def epoch_batches(
    key: Key,
    epoch: int,
    n: int,
    batch_size: int,
    *,
    start_step: int = 0,
    drop_last: bool = True,
    rank: int = 0,
    world: int = 1,
    groups: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield the batches of an epoch, as sample numbers in random order.

    Args:
        key: from :func:`~scan_fast.random.stream_key`.
        epoch: 0-based epoch.
        n: number of samples.
        batch_size: samples per batch. Fewer samples than this form one batch, so that small sets can train.
        start_step: batches to skip, for a run that resumes within an epoch.
        drop_last: skip an incomplete last batch.
        rank, world: yield the rank-th of ``world`` equal parts of each batch, so that the batches do not depend on the
            number of ranks.
        groups: (n,) int64 number of each sample's shard, to read the shards one after another (:mod:`.order`); None: in
            any order.

    Yields:
        (batch_size,) int64 sample numbers on the CPU; with several ranks, the part of this rank.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1, got {rank} of {world}")
    if min(batch_size, n) % world:
        raise ValueError(f"a batch of {min(batch_size, n)} samples cannot be divided among {world} ranks")
    steps = steps_per_epoch(n, batch_size, drop_last)
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    order = permutation(key, epoch, n) if groups is None else epoch_order(key, epoch, groups, batch_size)
    for step in range(start_step, steps):
        batch = order[step * batch_size : (step + 1) * batch_size]
        yield batch[len(batch) * rank // world : len(batch) * (rank + 1) // world]


def prefetch(function: Callable[[S], T], items: Iterable[S], *, depth: int = 3, threads: int = 2) -> Iterator[T]:
    """Yield function(item) for every item in order, computed by threads up to `depth` items in advance.

    An exception of the function is raised in the consumer after all earlier results. If the consumer stops early
    (close, break, an exception), each thread ends after its current item.

    Use it if the consumer waits for a device, or the function for files. If training itself runs on the CPU, both would
    compete for cores; render the views of resident images in the loop then.

    Args:
        function: computes a result; called from several threads at once.
        items: its arguments; iterated in the consumer's thread.
        depth: largest number of results that wait or are being computed, at least 1.
        threads: number of results that are computed at once: a second thread decodes the next batch while the first
            renders views.
    """
    if depth < 1 or threads < 1:
        raise ValueError(f"depth and threads must be at least 1, got {depth} and {threads}")
    return _prefetched(function, iter(items), depth, threads)


def _prefetched(function: Callable[[S], T], items: Iterator[S], depth: int, threads: int) -> Iterator[T]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        coming = deque(pool.submit(function, item) for item in islice(items, depth))
        while coming:
            result = coming.popleft().result()
            coming.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
