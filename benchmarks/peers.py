"""Optional peers: whether they are here, and what else a contender needs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from scan_fast.ops import native


def missing(package: str) -> str:
    """Return why a package cannot be used, or an empty string."""
    return "" if importlib.util.find_spec(package) is not None else "not installed"


def no_kernel(operator: str, device: str) -> str:
    """Return why the compiled kernel cannot run on a device, or an empty string."""
    if not native.is_available():
        return f"the compiled module could not be loaded: {native.load_error}"
    return "" if native.has_kernel(operator, device) else f"there is no kernel for {device} in this build"


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``torch.compile(function)`` for one fixed shape, with earlier shapes forgotten."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
