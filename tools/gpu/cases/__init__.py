"""Cases of the GPU suite: one module per family with CUDA kernels, which defines ``cases(size, kernels)``.

Shapes come in three sizes: ``"tiny"``, for rehearsals and compute-sanitizer; ``"smoke"``, few but so large that every
ring of shared memory of the kernels for sm_90a goes round at least twice on 132 multiprocessors and blocks get several
tiles; and ``"full"``. A module may also define ``EXEMPT``: a check that makes no sense for the family, and why. The
cases need torch alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensors]
Judge = Callable[[Tensors], str]
"""Maps the results of a kernel to what is wrong with them; "" if nothing is."""

SIZES = ("tiny", "smoke", "full")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHECKS = ("accuracy", "repeat", "graph", "call")


@dataclass(frozen=True)
class Case:
    """One problem for the kernels of a family.

    Attributes:
        label: the case in words, unique within the family.
        inputs: draws from a seed what ``call`` takes, on a device.
        call: runs the kernels and returns their results.
        judge: computes from the inputs what is right, and returns the function that judges results.
        checks: the checks that take it.
    """

    label: str
    inputs: Callable[[int, str], Tensors]
    call: Call
    judge: Callable[[Tensors], Judge]
    checks: tuple[str, ...] = CHECKS


def cases_of(family: str, size: str, kernels: str) -> Iterator[Case]:
    """Yield the cases of a family that a kernel set, ``"portable"`` or ``"sm90"``, is meant to take."""
    cases: Iterator[Case] = importlib.import_module(f"{__name__}.{family}").cases(size, kernels)
    yield from cases


def exempt(family: str, check: str) -> str:
    """Return why a check makes no sense for a family; empty if it does."""
    reasons: dict[str, str] = getattr(importlib.import_module(f"{__name__}.{family}"), "EXEMPT", {})
    return reasons.get(check, "")


def name_of(dtype: torch.dtype) -> str:
    """Return a dtype without its module: "float32"."""
    return str(dtype).removeprefix("torch.")
