"""Runs a function in several processes of one group, and collects what each of them answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def answers_by_rank(
    function: Callable[..., None], folder: Path, world: int, *arguments: Any, seconds: int
) -> list[Any]:
    """Run ``function(rank, store, world, *arguments, results)`` in ``world`` processes; return the answers by rank.

    Each process puts one answer, a tuple that begins with its rank, into ``results``. All of them must end well.

    Args:
        function: of a module that the processes can import.
        folder: takes the file by which the processes meet.
        world: number of processes.
        arguments: for the function.
        seconds: after which they are killed.
    """
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    given = (str(folder / "store"), world, *arguments, results)
    processes = [context.Process(target=function, args=(rank, *given)) for rank in range(world)]
    for process in processes:
        process.start()

    def kill() -> None:
        for process in processes:
            process.kill()

    guard = threading.Timer(seconds, kill)
    guard.start()
    for process in processes:
        process.join()
    guard.cancel()
    assert all(process.exitcode == 0 for process in processes)
    return sorted(results.get() for _ in processes)
