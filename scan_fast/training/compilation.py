"""torch.compile as an option: compilation in place, its cache, and its time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

CACHE = Path("~/.cache/scan-fast/compiled")


def compile_networks(networks: Iterable[nn.Module]) -> None:
    """Compile networks in place for the static shapes of training; parameter names stay."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE.expanduser()))
    for network in networks:
        network.compile(dynamic=False)


@contextmanager
def uncompiled(enabled: bool) -> Iterator[None]:
    """Run compiled networks eagerly: evaluation has other shapes, and each would cost a compilation."""
    if not enabled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def timed_first_step(step: Callable[[Any], None], batch: Any) -> dict[str, Any]:
    """Run the first step, in which everything is compiled, and measure it.

    Returns:
        ``{"seconds": ..., "cache": "cold" or "warm"}``; cold if anything had to be compiled.
    """
    from torch._dynamo.utils import counters

    def compiled() -> int:
        return counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]

    before, begin = compiled(), time.perf_counter()
    step(batch)
    seconds = round(time.perf_counter() - begin, 3)
    return {"seconds": seconds, "cache": "cold" if compiled() > before else "warm"}
