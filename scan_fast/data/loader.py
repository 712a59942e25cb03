"""Batches of an epoch in random order, and background threads that compute ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from torch import Tensor

from ..random import Key, permutation

S = TypeVar("S")
T = TypeVar("T")


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches :func:`epoch_batches` makes of n samples."""
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
) -> Iterator[Tensor]:
    """Yield one epoch's batches of sample numbers, in the epoch's random order.

    Args:
        key: from :func:`~scan_fast.random.stream_key`.
        epoch: 0-based epoch.
        n: number of samples.
        batch_size: samples per batch. Fewer samples than this make one batch of them all, so that small sets train.
        start_step: batches to leave out at the start, for a run that goes on in mid-epoch.
        drop_last: leave out a last batch that is not full.
        rank, world: take every world-th sample of each batch, from the rank-th; what all ranks take together does not
            depend on their number.

    Yields:
        (batch_size,) int64 sample numbers on the CPU; of several ranks, each one's part.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1, got {rank} of {world}")
    steps = steps_per_epoch(n, batch_size, drop_last)
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    order = permutation(key, epoch, n)
    for step in range(start_step, steps):
        yield order[step * batch_size : (step + 1) * batch_size][rank::world]


def prefetch(function: Callable[[S], T], items: Iterable[S], *, depth: int = 3, threads: int = 2) -> Iterator[T]:
    """Yield function(item) of every item in order, computed in background threads up to `depth` ahead of the consumer.

    What the function raises is raised in the consumer, after the good results before it. When the consumer stops early
    (close, break, an exception), the threads end after what they are computing.

    This pays where the consumer waits for a device or the function for files. On a CPU that also trains, both sides'
    thread teams would wait for each other's cores; make the views of resident images in the loop there.

    Args:
        function: computes a result; two threads may be in it at once.
        items: its arguments; taken in the consumer's thread.
        depth: how many results may wait or be in the making, at least 1.
        threads: how many are computed at once: a second one decodes the files of the next batch while the first
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
