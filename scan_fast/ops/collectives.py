"""Collectives with a gradient.

The plain ``torch.distributed.all_reduce`` has none: a loss of its result gets a wrong gradient without a word. With
those here, the gradient of a rank's tensor is that of the sum of all ranks' results. DistributedDataParallel divides by
the number of ranks, so a loss that is the same on every rank gets its own gradient. And if every rank's loss is that of
its own rows, the mean over the ranks is the loss of all rows, with its gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several_ranks() -> bool:
    """Return whether there is a process group of more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def all_gather(x: Tensor) -> Tensor:
    """Return the tensors of all ranks, of one shape, without a gradient: (world, *x.shape), by rank."""
    # PyTorch 2.14 has renamed it, and warns of the old name.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gathered = x.new_empty((dist.get_world_size(), *x.shape))
    collective(gathered.flatten(), x.detach().contiguous().flatten())
    return gathered


def total(x: Tensor) -> Tensor:
    """Return the sum of the tensors of all ranks, of one shape, without a gradient."""
    summed = x.detach().contiguous().clone()
    dist.all_reduce(summed)
    return summed


def gather_rows(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all ranks in their order, without a gradient: (sum of counts, ...).

    Args:
        x: (n, ...) rows of this rank.
        counts: n of each rank. They may differ, and may be 0.
    """
    # The collective wants tensors of one size.
    padded = x.new_zeros((max(counts), *x.shape[1:]))
    padded[: len(x)] = x.detach()
    return torch.cat([rows[:n] for rows, n in zip(all_gather(padded), counts, strict=True)])


def gather_numbers(numbers: Sequence[int], device: torch.device) -> list[list[int]]:
    """Return the numbers of all ranks, by rank. The host waits for the device."""
    rows: list[list[int]] = all_gather(torch.tensor(numbers, dtype=torch.int64, device=device)).tolist()
    return rows


def sum_over_ranks(x: Tensor) -> Tensor:
    """Return the sum of the tensors of all ranks, of one shape."""
    result: Tensor = _Sum.apply(x)
    return result


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of the tensors of all ranks, of one shape.

    The backward pass sends nothing: every rank must compute the same from the mean, as for a loss of the mean itself.
    Each part of the sum of all ranks' results then has the same gradient, and they add up to that of one.
    """
    result: Tensor = _Mean.apply(x)
    return result


def rows_of_all_ranks(x: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the rows of all ranks in their order, (sum of counts, D).

    Args:
        x: (n, D) rows of this rank.
        counts: n of each rank. They may differ, and may be 0.
    """
    result: Tensor = _Rows.apply(x, tuple(counts))
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return total(x).div_(dist.get_world_size())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: tuple[int, ...]) -> Tensor:
        ctx.counts = counts
        return gather_rows(x, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return total(grad).split(ctx.counts)[dist.get_rank()], None
