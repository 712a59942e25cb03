"""Runs the command line on several ranks, as torchrun starts them, and collects what each of them says."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from driving import Death, Process, Result


def free_port() -> int:
    """Return a port that is free at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class RankRun:
    """A command on several ranks of this machine.

    Args:
        world: number of ranks.
        words: the command.
        folder: takes the output of each rank.
        deaths: by rank, when it is killed.
        environment: further environment variables of all ranks.
        own: by rank, further environment variables.
    """

    def __init__(
        self,
        world: int,
        *words: object,
        folder: Path,
        deaths: Mapping[int, Death] | None = None,
        environment: Mapping[str, str] | None = None,
        own: Mapping[int, Mapping[str, str]] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        place = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        common = {name: str(value) for name, value in place.items()} | dict(environment or {})
        self.processes = [
            Process(
                *words,
                log=folder / f"rank{rank}",
                death=(deaths or {}).get(rank),
                environment={**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(own or {}).get(rank, {})},
            )
            for rank in range(world)
        ]

    def results(self, timeout: float = 240) -> list[Result]:
        """Wait for the end of all ranks."""
        return [process.result(timeout) for process in self.processes]


def run_on_ranks(world: int, *words: object, folder: Path, **named: Any) -> list[Result]:
    """Run a command on several ranks to its end, see :class:`RankRun`."""
    return RankRun(world, *words, folder=folder, **named).results()


def the_message(results: list[Result]) -> str:
    """Check that the ranks failed together and that one of them says why, in one line; return it."""
    assert all(result.code != 0 for result in results), results
    lines = [line for result in results for line in result.err.splitlines() if line.startswith("scan-fast: ")]
    assert len(lines) == 1, [result.err for result in results]
    return lines[0]
