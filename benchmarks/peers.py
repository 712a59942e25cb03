"""Optional peers: whether they are installed, and what else a contender needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from scan_fast.ops import native
from scan_fast.ops.families import FAMILIES


def missing(package: str) -> str:
    """Return why a package cannot be used; empty if it can."""
    return "" if importlib.util.find_spec(package) is not None else "not installed"


def no_kernel(family: str, device: str) -> str:
    """Return why the compiled kernels of a family cannot run on a device; empty if they can."""
    if not native.is_available():
        return f"the compiled module could not be loaded: {native.load_error}"
    operator = FAMILIES[family].operator
    return "" if native.has_kernel(operator, device) else f"there is no kernel for {device} in this build"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.compile(function)`` for one fixed shape, without what was compiled for earlier shapes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
