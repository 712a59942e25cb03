"""Shared by the processes of the suite: their kernel sets, and the JSON lines that they print."""

from __future__ import annotations

import argparse
import json
from typing import Any

from scan_fast.ops import native
from scan_fast.ops.families import GPU_FAMILIES

SETS = (
    *((family.name, "portable") for family in GPU_FAMILIES),
    *((family.name, "sm90") for family in GPU_FAMILIES if family.sm90 is not None),
)
"""Family and kernel set of all that is verified."""


def kernel_set(text: str) -> tuple[str, str]:
    """Parse ``FAMILY:KERNELS`` of a command line."""
    family, _, kernels = text.partition(":")
    if (family, kernels) not in SETS:
        known = " ".join(":".join(pair) for pair in SETS)
        raise argparse.ArgumentTypeError(f"{text!r} is no kernel set; there are {known}")
    return family, kernels


def prefer(family: str, kernels: str) -> None:
    """Make a family use one of its kernel sets from now on."""
    native.take_sm90(family, kernels == "sm90")


def emit(line: dict[str, Any]) -> None:
    """Print one object for the suite."""
    print(json.dumps(line), flush=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
