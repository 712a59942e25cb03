"""Strict loading of weights: never a silent partial load."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import WeightsError

_SHOWN = 12


def load_strict(module: nn.Module, state_dict: Mapping[str, Tensor], *, what: str) -> None:
    """Copy ``state_dict`` into ``module``; every name and shape must agree.

    Args:
        module: the model to fill; it is left untouched if an error is raised.
        state_dict: tensors by name.
        what: what is being loaded, for the error, e.g. ``"the pretext weights runs/a/checkpoints/pretext.pt"``.

    Raises:
        WeightsError: listing the missing, unexpected, wrongly shaped and non-finite entries.
    """
    own, given = module.state_dict(), state_dict
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
    module.load_state_dict(given)


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"
