"""Strict loading of weights: never a silent partial load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WeightsError

_SHOWN = 12
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor], *, what: str) -> None:
    """Copy ``state_dict`` into ``module``; every name and shape must agree.

    Args:
        module: the model to fill; it is left untouched if an error is raised.
        state_dict: tensors by name.
        what: what is being loaded, for the error, e.g. ``"the pretext weights runs/a/checkpoints/pretext.pt"``.

    Raises:
        WeightsError: listing the missing, unexpected, wrongly shaped and non-finite entries.
    """
    check_fits(module, state_dict, what=what)
    module.load_state_dict(state_dict)


def check_fits(module: nn.Module, state_dict: Mapping[str, Tensor], *, what: str) -> None:
    """Check what :func:`load_strict` would copy.

    Args:
        module: the model, which may be on the device "meta".
        state_dict: tensors by name.
        what: as in :func:`load_strict`.

    Raises:
        WeightsError: as :func:`load_strict`.
    """
    own, given = module.state_dict(), state_dict
    if unusable := unusable_entries(given):
        raise WeightsError(f"{what} hold {_listed('entries that are not plain real numbers', unusable)}")
    shapes = [
        f"{name}: {tuple(given[name].shape)} where the model has {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    non_finite = [name for name, value in given.items() if not bool(torch.isfinite(value).all())]
    problems = [
        _listed("missing", [name for name in own if name not in given]),
        _listed("unexpected", [name for name in given if name not in own]),
        _listed("of another shape", shapes),
        _listed("not finite", non_finite),
    ]
    found = [problem for problem in problems if problem]
    if found:
        raise WeightsError(f"{what} do not fit {type(module).__name__}: " + "; ".join(found))


def is_state_dict(value: Any) -> bool:
    """Return whether a value holds tensors by name."""
    return isinstance(value, dict) and all(
        isinstance(name, str) and isinstance(entry, Tensor) for name, entry in value.items()
    )


def unusable_entries(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are sparse, nested, quantised, complex, or without content (device "meta")."""
    return [
        name
        for name, value in tensors.items()
        if value.layout != torch.strided
        or value.is_nested
        or value.is_quantized
        or value.is_meta
        or not (value.dtype in _FLOATS or value.dtype in _WHOLE)
    ]


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"
