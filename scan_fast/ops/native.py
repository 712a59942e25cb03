"""Load the compiled module, and say what it holds."""

from __future__ import annotations

import os
from typing import Any

import torch  # torch must be loaded before the compiled module: it brings the libraries that the module links to

from ..errors import UsageError
from .families import FAMILIES, FAMILY_OF

OPERATORS = tuple(FAMILY_OF)
"""Entry operator of each family, as registered by the compiled module in ``torch.ops.scan_fast``."""

GPU_KERNELS = {family.name: (family.sm90, family.portable) for family in FAMILIES.values() if family.sm90 is not None}
"""CUDA sources of the families with kernels for sm_90a: the source of those, then the portable one."""

load_error: str | None = None
"""Reason why the compiled module was not loaded, or None."""
try:
    import scan_fast._C as _C
except ImportError as error:
    load_error = str(error)
    _C = None  # type: ignore[assignment]
else:
    missing = [name for name in OPERATORS if not torch._C._dispatch_has_kernel(f"scan_fast::{name}")]
    if missing:
        load_error = f"scan_fast._C was built from other sources and lacks {', '.join(missing)}"
        _C = None  # type: ignore[assignment]

# Pairs of operator and device type with a kernel. They are fixed at import, so that torch.compile sees a constant.
_KERNELS = frozenset(
    (operator, device)
    for operator in OPERATORS
    for device, key in (("cpu", "CPU"), ("cuda", "CUDA"))
    if _C is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"scan_fast::{operator}", key)
)


def build_info() -> dict[str, Any]:
    """Return facts about the build of the compiled module, or ``{"error": reason}`` if it is not loaded."""
    if _C is None:
        return {"error": load_error}
    return dict(_C.build_info())


def kernel_choice() -> str:
    """Return the value of the environment variable SCAN_FAST_GPU_KERNELS, ``"auto"`` if it is not set.

    With ``"auto"`` a family uses its kernels for sm_90a once :mod:`scan_fast.ops.trust` trusts them, with ``"sm90"``
    without a test, and with ``"portable"`` never. The portable kernels compute what those for sm_90a do not cover.

    Raises:
        ValueError: for another value.
    """
    mode = os.environ.get("SCAN_FAST_GPU_KERNELS", "auto")
    if mode not in ("auto", "portable", "sm90"):
        raise UsageError(f'SCAN_FAST_GPU_KERNELS must be "auto", "portable" or "sm90", got {mode!r}')
    return mode


SM90_FAMILIES: set[str] = set()
"""Families that use their kernels for sm_90a on a GPU of compute capability 9.0 at present."""


def has_sm90(family: str) -> bool:
    """Return whether this build has kernels for sm_90a of a family."""
    return family in GPU_KERNELS and bool(build_info().get("sm90_kernels"))


def takes_sm90(family: str) -> bool:
    """Return whether a family uses its kernels for sm_90a on a GPU of compute capability 9.0."""
    return family in SM90_FAMILIES


def take_sm90(family: str, on: bool) -> None:
    """Switch the kernels for sm_90a of a family on or off; do nothing if this build has none."""
    if has_sm90(family):
        _C.prefer_sm90(family, on)
        (SM90_FAMILIES.add if on else SM90_FAMILIES.discard)(family)


KERNEL_CHOICE = kernel_choice()
for _family in GPU_KERNELS:
    take_sm90(_family, KERNEL_CHOICE == "sm90")


def is_available() -> bool:
    """Return whether the compiled module is loaded."""
    return _C is not None


def has_kernel(operator: str, device: str) -> bool:
    """Return whether an operator of :data:`OPERATORS` is compiled for a device type, ``"cpu"`` or ``"cuda"``."""
    return (operator, device) in _KERNELS


def empty_large(sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialised tensor; on the CPU a large one reuses the memory of freed results, which is faster."""
    if _C is None or device.type != "cpu":
        return torch.empty(sizes, dtype=dtype, device=device)
    return _C.empty_large(sizes, dtype)


def amx_peak_rate() -> float:
    """Measure the flops per second of one thread's AMX tiles with operands in the first cache; 0 without AMX."""
    return 0.0 if _C is None else _C.amx_peak_rate()
