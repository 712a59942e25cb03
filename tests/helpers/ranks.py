"""Runs a function in several processes of one group, and collects what each of them answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from driving import rank_process, rank_results


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
    results = rank_results()
    given = (str(folder / "store"), world, *arguments, results)
    processes = [rank_process(function, (rank, *given)) for rank in range(world)]
    answers: list[Any] = []

    def read() -> None:
        # While they run: a large answer waits in its pipe for a reader.
        while len(answers) < world:
            answers.append(results.get())

    reader = threading.Thread(target=read, daemon=True)
    for process in processes:
        process.start()
    reader.start()
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0] * world
    reader.join(10)
    assert len(answers) == world, f"of {world} processes {len(answers)} have answered"
    return sorted(answers)
