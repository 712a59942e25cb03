"""Threads of small computations.

Threads that share one small operation wait for each other after it. On a busy machine, that takes many times longer
than the operation. So computations that consist of many small ones run on one thread each, several of them at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute PyTorch's operations on one thread of the CPU within the block.

    PyTorch keeps the number per calling thread; MKL's is changed for all threads meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def on_all_cores(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Return the function's results for the items, computed on as many threads as there are cores.

    Each call computes on one thread, so that it gives the same bits on any machine of a kind.
    """
    from threadpoolctl import threadpool_limits

    def start() -> None:
        # Both numbers are of the calling thread, which ends with the pool.
        torch.set_num_threads(1)
        threadpool_limits(1, user_api="openmp")

    tasks = list(items)
    workers = min(max(1, len(tasks)), os.cpu_count() or 1)
    # The limit of BLAS is one for the process: set by each call, it would end with the first one.
    with (
        one_thread(),
        threadpool_limits(1, user_api="blas"),
        ThreadPoolExecutor(workers, initializer=start) as pool,
    ):
        return list(pool.map(function, tasks))
