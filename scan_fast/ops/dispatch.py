"""Decide for each call which implementation runs."""

from __future__ import annotations

import warnings
from typing import Literal

import torch
from torch.autograd import forward_ad

from ..errors import UsageError
from . import native, trust
from .families import FAMILY_OF

Impl = Literal["auto", "native", "reference"]
IMPLEMENTATIONS = ("auto", "native", "reference")

_warned = False


def use_native(impl: str, tensor: torch.Tensor, operator: str, *, differentiable: bool = False) -> bool:
    """Decide between the compiled kernel and the reference for one call.

    Args:
        impl: ``"auto"``, ``"native"`` or ``"reference"``.
        tensor: input of the call, whose device and dtype decide whether there is a kernel.
        operator: entry operator of the family, e.g. ``"scan_loss_forward"``.
        differentiable: the result has derivatives, which kernels compute in reverse mode only.

    Returns:
        True for the compiled kernel. ``"auto"`` uses the reference if there is no compiled module (with one warning per
        process), if there is no kernel for the device or the dtype, if forward-mode derivatives may be wanted, and if
        the kernel is not trusted on this GPU (:mod:`scan_fast.ops.trust`).

    Raises:
        ValueError: for an unknown ``impl``.
        UsageError: for ``"native"`` if no kernel takes the input.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl must be "auto", "native" or "reference", got {impl!r}')
    if impl == "reference":
        return False
    # An integer that torch.func.jvp and dual_level() raise from -1. Looking at the tensors would cost more than a call.
    if differentiable and forward_ad._current_level >= 0:
        if impl == "native":
            raise UsageError(f'impl="native" has no forward-mode derivatives for {operator}; use "auto" or "reference"')
        return False
    device = tensor.device
    kind = device.type
    reason = _why_not(tensor.dtype, kind, operator)
    if reason is None:
        # The kernels of a CPU need no trust, so this is all that a call costs there.
        if kind not in trust.DEVICE_TYPES or impl == "native":
            return True
        return trust.takes_kernel(FAMILY_OF[operator], kind, device.index or 0)
    if impl == "native":
        raise UsageError(f'impl="native" is not possible for {operator}: {reason}')
    if not native.is_available():
        _warn_once()
    return False


_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _why_not(dtype: torch.dtype, kind: str, operator: str) -> str | None:
    if native.has_kernel(operator, kind) and dtype in _DTYPES:
        return None
    if not native.is_available():
        return f"the compiled module scan_fast._C could not be loaded ({native.load_error})"
    if dtype not in _DTYPES:
        return f"there is no kernel for {dtype}; use float32, bfloat16 or float16"
    return f"there is no kernel for device {kind!r} in this build"


def _warn_once() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "scan_fast runs without its compiled kernels and uses plain PyTorch: "
            f"{native.load_error}. Build them with `pip install --no-build-isolation -e .`",
            RuntimeWarning,
            stacklevel=4,
        )
