"""Checks of arguments that all ranks pass together: either every rank goes on, or every rank raises the same error.

A rank that raised alone would leave the others waiting for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from .collectives import gather_numbers

_LONGEST_MESSAGE = 512


def gather_checked(numbers: Sequence[int], fault: str | None) -> list[list[int]]:
    """Return the numbers of all ranks, by rank.

    Args:
        numbers: as many on every rank, each from -2^63 to 2^63 - 1. They are not looked at if there is a fault.
        fault: what is wrong with this rank's arguments, or None.

    Raises:
        ValueError: on every rank, with the same message, if any rank has a fault.
    """
    device = _meeting_device()
    found = gather_numbers([int(fault is not None), *numbers], device)
    if any(rank[0] for rank in found):
        text = (fault or "").encode()[:_LONGEST_MESSAGE].ljust(_LONGEST_MESSAGE, b"\0")
        messages = [bytes(rank).rstrip(b"\0").decode(errors="ignore") for rank in gather_numbers(list(text), device)]
        raise ValueError("; ".join(f"rank {rank}: {message}" for rank, message in enumerate(messages) if message))
    return [rank[1:] for rank in found]


def require_same(passed: Mapping[str, Sequence[object]]) -> None:
    """Check that every rank passed the same.

    Args:
        passed: by what is compared, the values of all ranks, by rank.

    Raises:
        ValueError: for the first one that differs, with the value of each rank.
    """
    for name, values in passed.items():
        if any(value != values[0] for value in values):
            got = ", ".join(f"{value} on rank {rank}" for rank, value in enumerate(values))
            raise ValueError(f"every rank must pass the same {name}, got {got}")


def _meeting_device() -> torch.device:
    """Return a device on which all ranks can meet, whatever tensors they were given."""
    kinds = [part.split(":")[0] for part in dist.get_backend_config().split(",")]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
