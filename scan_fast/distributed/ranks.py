"""Who takes part in a run, the part of each, and values that all of them share.

All ranks run the same program and take the same decisions, because what they decide by is the same on each: results are
gathered on all ranks, and the run folder is read and written by rank 0 alone, which tells the others. Without several
ranks every function here does its work at once and sends nothing.
"""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankError
from ..ops.collectives import gather_rows, total

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The place of this process among those of a run.

    Attributes:
        rank: its number, from 0.
        world: number of processes.
        local_rank: its number among those of its machine, from 0.
        local_world: number of processes on its machine.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1


_ranks = Ranks()
_thread = threading.local()
_first_works = False
"""True while rank 0 does something for all: its threads are alone then, too."""


def current() -> Ranks:
    """Return the place of this process; rank 0 of 1 unless :func:`.joining.join` has found others."""
    return _ranks


def enter(ranks: Ranks) -> None:
    """Take a place, after the process group was made."""
    global _ranks
    _ranks = ranks


def several() -> bool:
    """Return whether what follows is done together with other ranks."""
    return _ranks.world > 1 and not _first_works and not getattr(_thread, "alone", False)


def is_first() -> bool:
    """Return whether this is rank 0, which writes and prints."""
    return _ranks.rank == 0


@contextmanager
def alone() -> Iterator[None]:
    """Let this thread work as if there were no other ranks."""
    before = getattr(_thread, "alone", False)
    _thread.alone = True
    try:
        yield
    finally:
        _thread.alone = before


def on_first(function: Callable[[], T]) -> T:
    """Call a function on rank 0 alone, and return its result on all ranks.

    The other ranks wait. The result is sent as a pickle, so its tensors should be on the CPU. An error of the function
    is raised on all ranks.
    """
    global _first_works
    if not several():
        return function()
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_first():
        _first_works = True
        try:
            outcome = function(), None
        except Exception as error:
            outcome = None, error
        finally:
            _first_works = False
    own = outcome
    if own[1] is not None and not _can_travel(own[1]):
        outcome = None, RankError(f"rank 0: {type(own[1]).__name__}: {own[1]}")
    sent = [outcome]
    dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
    result, problem = own if is_first() else sent[0]
    if problem is not None:
        raise problem
    value: T = result
    return value


def _can_travel(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def agreed(value: T) -> T:
    """Return the value of rank 0 on all ranks."""
    return on_first(lambda: value)


def gathered(value: T) -> list[T]:
    """Return the values of all ranks, by rank."""
    if not several():
        return [value]
    values: list[Any] = [None] * _ranks.world
    dist.all_gather_object(values, value)
    return values


def wait() -> None:
    """Return once all ranks have come here."""
    if several():
        dist.all_reduce(torch.zeros(1))


def mean(x: Tensor) -> Tensor:
    """Return the mean of the tensors of all ranks, without a gradient."""
    return total(x) / _ranks.world if several() else x


def shares(n: int, block: int = 1) -> list[tuple[int, int]]:
    """Return for each rank the first of its rows and the end: consecutive rows of ``n``, in whole blocks."""
    world = _ranks.world if several() else 1
    blocks = -(-n // block)
    bounds = [min(n, blocks * rank // world * block) for rank in range(world + 1)]
    return list(itertools.pairwise(bounds))


def share(n: int, block: int = 1) -> tuple[int, int]:
    """Return the first row of this rank and the end, see :func:`shares`."""
    return shares(n, block)[_ranks.rank if several() else 0]


def all_rows(x: Tensor, counts: Sequence[int], dim: int = 0) -> Tensor:
    """Return the rows of all ranks, in their order, on each of them; without a gradient.

    Args:
        x: the rows of this rank along ``dim``.
        counts: number of rows of each rank; some may be 0.
        dim: the dimension of the rows.
    """
    if not several():
        return x
    return gather_rows(x.detach().movedim(dim, 0), counts).movedim(0, dim)


def rows_on_first(x: Tensor, counts: Sequence[int]) -> Tensor | None:
    """Return the rows of all ranks, in their order, on the CPU of rank 0; None on the others.

    Rank 0 gets them one rank after another, so no rank holds more than its own part and, on rank 0, the result.
    """
    if not several():
        return x.cpu()
    own = x.detach().cpu().contiguous()
    if not is_first():
        if own.numel():
            dist.send(own, dst=0)
        return None
    rows = own.new_empty((sum(counts), *own.shape[1:]))
    begin = 0
    for rank, n in enumerate(counts):
        part = rows[begin : begin + n]
        if rank == 0:
            part.copy_(own)
        elif part.numel():
            dist.recv(part, src=rank)
        begin += n
    return rows
