"""Finds the compiled module and decides, per call, which implementation runs."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch  # torch must be loaded before the compiled module: it brings the libraries that the module links to

Impl = Literal["auto", "native", "reference"]
IMPLEMENTATIONS = ("auto", "native", "reference")

_C: Any = None
load_error: str | None = None
try:
    from scan_fast import _C as _compiled

    _C = _compiled
except ImportError as error:
    load_error = str(error)

_warned = False


def is_available() -> bool:
    """Return True where the compiled module was found and loaded."""
    return _C is not None


def build_info() -> dict[str, Any]:
    """Return what the compiled module was built with, or ``{"error": reason}`` where there is none."""
    if _C is None:
        return {"error": load_error}
    return dict(_C.build_info())


def use_native(impl: str, tensor: torch.Tensor, operator: str) -> bool:
    """Decide between the compiled kernel and the reference for one call.

    Args:
        impl: ``"auto"``, ``"native"`` or ``"reference"``.
        tensor: an input of the call; its device and dtype decide whether a kernel exists.
        operator: the dispatcher operator that would run, e.g. ``"scan_loss_forward"``.

    Returns:
        True for the compiled kernel. ``"auto"`` falls back to the reference where there is no compiled module (with
        one warning per process), no kernel for the device, or for float64.

    Raises:
        ValueError: for an unknown ``impl``, or ``"native"`` with an input no kernel takes.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f'impl must be "auto", "native" or "reference", got {impl!r}')
    if impl == "reference":
        return False
    reason = _why_not(tensor, operator)
    if reason is None:
        return True
    if impl == "native":
        raise ValueError(f'impl="native" is not possible for {operator}: {reason}')
    if _C is None:
        _warn_once()
    return False


def _why_not(tensor: torch.Tensor, operator: str) -> str | None:
    if _C is None:
        return f"the compiled module scan_fast._C could not be loaded ({load_error})"
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"there is no kernel for {tensor.dtype}; use float32, bfloat16 or float16"
    device = tensor.device.type
    if device == "cpu":
        return None
    if device == "cuda" and build_info()["cuda"] is not None:
        return None
    return f"there is no kernel for device {device!r} in this build"


def _warn_once() -> None:
    global _warned
    if not _warned and not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(
            "scan_fast runs without its compiled kernels and uses plain PyTorch: "
            f"{load_error}. Build them with `pip install --no-build-isolation -e .`",
            RuntimeWarning,
            stacklevel=4,
        )
