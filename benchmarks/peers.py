"""Optional peers: whether they are installed, and what else a contender needs."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from scan_fast.ops import native
from scan_fast.ops.families import FAMILIES


def missing(package: str) -> str:
    """Return why a package cannot be used; empty if it can."""
    return "" if importlib.util.find_spec(package) is not None else "not installed"


def load_faiss() -> Any:
    """Import faiss, whose OpenBLAS takes the kernels of this processor and as many threads as PyTorch has.

    OpenBLAS reads its variables once, when it is loaded: ``OPENBLAS_CORETYPE`` would choose kernels of another
    processor, ``OPENBLAS_NUM_THREADS`` another number of threads. So they are unset before.
    """
    for name in [name for name in os.environ if name.startswith(("OPENBLAS_", "GOTO_"))]:
        del os.environ[name]
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


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
