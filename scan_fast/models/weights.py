"""Strict loading of weights: never a silent partial load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import WeightsError

_SHOWN = 12


def load_strict(
    module: nn.Module, state_dict: Mapping[str, Tensor], *, what: str, ignore_prefixes: Sequence[str] = ()
) -> None:
    """Copy ``state_dict`` into ``module``, where every name and shape must agree.

    Args:
        module: the model to fill; it is left untouched where an error is raised.
        state_dict: tensors by name.
        what: what is being loaded, for the error, e.g. ``"the pretext weights runs/a/checkpoints/pretext.pt"``.
        ignore_prefixes: names that start with one of these are left out on both sides: neither missing in
            ``state_dict`` (the module keeps its values) nor unexpected in it. Give them with their dot,
            ``"contrastive_head."``.

    Raises:
        WeightsError: listing the missing, unexpected, wrongly shaped and non-finite entries.
    """
    ignored = tuple(ignore_prefixes)
    own = {name: value for name, value in module.state_dict().items() if not name.startswith(ignored)}
    given = {name: value for name, value in state_dict.items() if not name.startswith(ignored)}
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
    if not own:
        found.append("ignore_prefixes leaves nothing of the model to load")
    if found:
        raise WeightsError(f"{what} do not fit {type(module).__name__}: " + "; ".join(found))
    module.load_state_dict(given, strict=False)


def _listed(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{more})"
