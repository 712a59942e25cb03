"""Words for the problems of a configuration, from the errors of pydantic."""

from __future__ import annotations

import difflib
import reprlib
from typing import Any

from pydantic import BaseModel

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxlong, _REPR.maxother = 3, 200, 100, 200


def explain(problem: Any, root: type[BaseModel]) -> str:
    """Return what is wrong with a value: its key and, for an unknown one, the nearest.

    Args:
        problem: one of ``ValidationError.errors()``.
        root: the model that refused.
    """
    location = [str(part) for part in problem["loc"]]
    key = ".".join(_without_kinds(location, root))
    if problem["type"] == "extra_forbidden":
        known = sorted({name for model in _models(location[:-1], root) for name in model.model_fields})
        near = difflib.get_close_matches(location[-1], [name.rsplit(".", 1)[-1] for name in known], n=1, cutoff=0.5)
        section = ".".join(_without_kinds(location[:-1], root))
        if near:
            hint = f"did you mean {'.'.join([*_without_kinds(location[:-1], root), near[0]])}?"
        else:
            hint = f"{section or 'the top level'} has {', '.join(known)}"
        return f"unknown key {key}: {hint}"
    if problem["type"] == "union_tag_not_found":
        kinds = ", ".join(_kind(model) for model in _models(location, root) if "kind" in model.model_fields)
        return f"{key}.kind is missing: give one of {kinds} beside {shown(problem['input'])}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "value_error":  # raised by our own validators, which say what was given
        return f"{key}: {problem['ctx']['error']}" if key else str(problem["ctx"]["error"])
    given = problem.get("input")
    return f"{key}: {problem['msg'][0].lower()}{problem['msg'][1:]}, got {shown(given)}"


def shown(value: Any) -> str:
    """Return the representation of a value, at most 300 characters of it and three mappings or lists deep."""
    try:
        text = _REPR.repr(value)
        return text if len(text) <= 300 else f"{text[:300]}..."
    except ValueError:  # of a whole number with thousands of digits
        return f"a value of type {type(value).__name__} that is too large to be shown"


def _without_kinds(location: list[str], root: type[BaseModel]) -> list[str]:
    """Drop the union tags that pydantic inserts into locations (``pretext.method.simclr`` -> ``pretext.method``)."""
    kept: list[str] = []
    models: list[type[BaseModel]] = [root]
    for part in location:
        tagged = [model for model in models if "kind" in model.model_fields and _kind(model) == part]
        if tagged and not any(part in model.model_fields for model in models):
            models = tagged
        else:
            kept.append(part)
            models = [inside for model in models for inside in _models_at(model, part)]
    return kept


def _models(location: list[str], root: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models that the section at a location may be of."""
    models: list[type[BaseModel]] = [root]
    for part in location:
        inner = [inside for model in models for inside in _models_at(model, part)]
        # A part that is no field is the tag of a union, which picks one of the models at hand.
        models = inner or [model for model in models if "kind" in model.model_fields and _kind(model) == part]
    return models


def _models_at(model: type[BaseModel], field: str) -> list[type[BaseModel]]:
    return _models_of(model.model_fields[field].annotation) if field in model.model_fields else []


def _kind(model: type[BaseModel]) -> str:
    return str(model.model_fields["kind"].default)


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if parts := getattr(annotation, "__args__", ()):  # first, because Python 3.10 takes tuple[int] for a type
        return [model for part in parts for model in _models_of(part)]
    return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
