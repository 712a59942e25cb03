"""Trace the launches of CUDA kernels, for tests, and for benchmarks that name the kernels they measured."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from . import native


def short_name(signature: str) -> str:
    """Return a kernel's name with its template arguments, e.g. ``"prepare_kernel<float>"``.

    Args:
        signature: its C++ signature, e.g. ``"void scan_fast::(anonymous namespace)::prepare_kernel<float>(float*)"``.
    """
    name = re.sub(r"\(anonymous namespace\)::|\bscan_fast::", "", signature).removeprefix("void ")
    # Casts of template arguments, such as (bool)1 or (Kind)2, are not parameter lists.
    return re.sub(r"\(.*", "", re.sub(r"\([\w ]+\)(?=-?\d)", "", name)).strip()


@contextmanager
def trace_launches() -> Iterator[list[str]]:
    """Collect the names of this package's CUDA kernels that are launched in the block, each once, in order.

    Yields:
        a list that is filled when the block ends. It stays empty on the CPU, without the compiled module, and if a
        replayed CUDA graph launches the kernels. Traces do not nest, and see all threads of the process.
    """
    names: list[str] = []
    if not native.is_available():
        yield names
        return
    native._C.trace_launches(True)
    try:
        yield names
    finally:
        native._C.trace_launches(False)
        names += map(short_name, native._C.launched())
