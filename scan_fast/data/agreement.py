"""Opening of images by several ranks: in turn if one of them fetches files, with one error and the same names on all.

With one process every function here does its work at once. All ranks must call the same functions in the same order.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from .. import distributed
from ..errors import DataError, RankError, ScanFastError

T = TypeVar("T")

_PART_BYTES = 1 << 26
"""Most bytes that one exchange of rows collects."""


def on_all(function: Callable[[], T]) -> T:
    """Call a function on every rank and return its own result on each.

    Raises:
        Exception: on all ranks, the error of the first rank that has one; its text names the rank unless all ranks have
            the same one.
    """
    if not distributed.several():
        return function()
    result, problem = _outcome(function)
    raise_first(problem, names_rank=True)
    return result  # type: ignore[return-value]


def in_turn(function: Callable[[], T]) -> T:
    """Call a function on rank 0, then on one process of each other machine, then on the rest; return its own result.

    What the first call downloads or unpacks, the others find, whether or not machines share a disk.

    Raises:
        Exception: on all ranks, the error of the first rank that has one.
    """
    if not distributed.several():
        return function()
    place = distributed.current()
    own_turn = 0 if place.rank == 0 else 1 if place.local_rank == 0 else 2
    result: T | None = None
    for turn in range(3):
        problem = None
        if turn == own_turn:
            result, problem = _outcome(function)
        # Everybody waits here, so the next turn begins after this one.
        raise_first(problem)
    return result  # type: ignore[return-value]


def _outcome(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        with distributed.alone():
            return function(), None
    except Exception as error:
        return None, error


def raise_first(problem: Exception | None, *, names_rank: bool = False) -> None:
    """Raise the error of the first rank that has one, on all ranks.

    Args:
        problem: the error of this rank, if any.
        names_rank: add the rank and its machine to the message, unless all ranks have the same error.
    """
    told = None if problem is None else (_portable(problem), socket.gethostname())
    found = distributed.gathered(told)
    rank = next((rank for rank, each in enumerate(found) if each is not None), None)
    if rank is None:
        return
    first = found[rank]
    assert first is not None
    error, machine = first
    if names_rank and any(each is None or str(each[0]) != str(error) for each in found):
        raise type(error)(f"rank {rank} on {machine}: {error}") from problem
    if problem is not None and rank == distributed.current().rank:
        raise problem
    raise error


def _portable(error: Exception) -> ScanFastError:
    return error if isinstance(error, ScanFastError) else RankError(f"{type(error).__name__}: {error}")


def check_same(names: Sequence[str], what: str) -> None:
    """Compare names between ranks.

    Args:
        names: of this rank.
        what: what they name, in the plural.

    Raises:
        DataError: on all ranks, if a rank has other names than rank 0. The message names the first that differs.
    """
    if not distributed.several():
        return
    found = distributed.gathered((len(names), digest("\0".join(names)), socket.gethostname()))
    rank = next((rank for rank, each in enumerate(found) if each[:2] != found[0][:2]), None)
    if rank is None:
        return
    first = distributed.agreed(list(names))
    row = next((i for i, pair in enumerate(zip(first, names, strict=False)) if len(set(pair)) > 1), None)
    row = min(len(first), len(names)) if row is None else row
    row, other = distributed.gathered((row, _at(names, row)))[rank]
    raise DataError(
        f"the ranks find different {what}: rank 0 on {found[0][2]} has {_at(first, row)} as number {row + 1} of "
        f"{found[0][0]}, rank {rank} on {found[rank][2]} has {other} as number {row + 1} of {found[rank][0]}; give all "
        "machines the same"
    )


def _at(names: Sequence[str], row: int) -> str:
    return names[row] if row < len(names) else "none"


def digest(content: str | bytes) -> str:
    """Return 16 hexadecimal digits of a hash."""
    data = content.encode(errors="surrogateescape") if isinstance(content, str) else content
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def fill_rows(rows: Tensor, parts: Sequence[tuple[int, int]]) -> None:
    """Fill the rows that other ranks have computed, a part at a time, so that little memory is needed besides.

    Args:
        rows: on the CPU, with the rows of this rank filled; changed in place.
        parts: the first row of each rank and the end.
    """
    if not distributed.several():
        return
    own = distributed.current().rank
    each = max(1, _PART_BYTES // (len(parts) * max(1, rows[0].nbytes)))
    for start in range(0, max(end - begin for begin, end in parts), each):
        pieces = [(min(begin + start, end), min(begin + start + each, end)) for begin, end in parts]
        counts = [end - begin for begin, end in pieces]
        found = distributed.all_rows(rows[slice(*pieces[own])], counts)
        for (begin, end), piece in zip(pieces, found.split(counts), strict=True):
            rows[begin:end] = piece
