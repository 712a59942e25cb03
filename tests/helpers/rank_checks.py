"""What each rank finds when it compares its results with those of one process that has all rows."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scan_fast.distributed import ranks


class Checks:
    """Compares tensors, and collects in words what differs; the words fit into an answer of any length.

    Attributes:
        differences: one line for each comparison that failed.
        done: number of comparisons.
    """

    def __init__(self) -> None:
        self.differences: list[str] = []
        self.done = 0

    def close(self, what: str, found: Tensor, expected: Tensor, rtol: float, atol: float = 0.0) -> None:
        """Compare relative to the largest expected number, beyond an absolute error."""
        self.done += 1
        found, expected = found.detach().double(), expected.detach().double()
        if found.shape != expected.shape:
            self.differences.append(f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
            return
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        error = float((found - expected).abs().max()) if expected.numel() else 0.0
        if not error <= rtol * largest + atol:
            self.differences.append(f"{what}: differs by {error:.3g}, largest number {largest:.3g}")

    def true(self, what: str, value: bool) -> None:
        """Note what is not true."""
        self.done += 1
        if not value:
            self.differences.append(what)


def join(rank: int, store: str, world: int) -> None:
    """Meet the other ranks, with one thread each."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    ranks.enter(ranks.Ranks(rank, world, rank, world))


def leave(rank: int, checks: Checks, results: Any) -> None:
    """Answer with what was found, and part from the other ranks."""
    results.put((rank, checks.differences[:20], checks.done))
    dist.barrier()
    dist.destroy_process_group()


def own_rows(x: Tensor, rank: int, world: int, dim: int = 0) -> Tensor:
    """Return this rank's rows of a batch, a copy."""
    return x.chunk(world, dim)[rank].clone()


def mean_over_ranks(x: Tensor) -> Tensor:
    """Return the mean of the ranks' tensors, float64."""
    total = x.detach().double().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def same_everywhere(x: Tensor) -> bool:
    """Return whether all ranks have the same bits."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, x.detach().contiguous().numpy().tobytes())
    return all(other == everyone[0] for other in everyone)
