"""torch.compile as an option: what is compiled, where its cache is kept, and what it cost."""

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
    """Compile the calls of networks in place, for the static shapes of training; names of parameters stay."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE.expanduser()))
    for network in networks:
        network.compile(dynamic=False)


@contextmanager
def uncompiled(enabled: bool) -> Iterator[None]:
    """Let compiled networks run as they are written: evaluation has other shapes, each worth a compilation."""
    if not enabled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def timed_first_step(step: Callable[[Any], None], batch: Any) -> dict[str, Any]:
    """Do a first step, in which everything is compiled, and say how long it took and whether the cache had it.

    Returns:
        ``{"seconds": ..., "cache": "cold" or "warm"}``; cold where anything had to be compiled anew.
    """
    from torch._dynamo.utils import counters

    def compiled() -> int:
        return counters["inductor"]["fxgraph_cache_miss"] + counters["aot_autograd"]["autograd_cache_miss"]

    before, begin = compiled(), time.perf_counter()
    step(batch)
    seconds = round(time.perf_counter() - begin, 3)
    return {"seconds": seconds, "cache": "cold" if compiled() > before else "warm"}
