"""The strict base of every configuration model."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


class Settings(BaseModel):
    """A frozen configuration section: unknown keys are errors, and defaults are checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _plain_numbers(cls, values: Any) -> Any:
        # pydantic reads true as 1, and YAML reads yes and on as true.
        if isinstance(values, dict):
            for name, field in cls.model_fields.items():
                if isinstance(values.get(name), bool) and bool not in (field.annotation, *get_args(field.annotation)):
                    raise ValueError(f"{name} must not be true or false")
                given = values.get(name)
                for number in given if isinstance(given, (list, tuple)) else (given,):
                    # Larger ones fit no tensor, and of thousands of digits they cannot even be written.
                    if isinstance(number, int) and not -(2**63) <= number < 2**63:
                        raise ValueError(f"{name} must be below 2^63, got a number of {number.bit_length()} bits")
        return values


BARE_KIND = BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
"""Lets a section that is chosen by ``kind`` be given as the bare name: ``view: plain`` is ``view: {kind: plain}``."""


_ENTRY = re.compile(r"    (\w+(?:, \w+)*): (.*)")


@cache
def field_texts(model: type[Settings]) -> dict[str, str]:
    """Return the description of each field of a model, in the markup of docstrings.

    A field is described by a string under its definition, or by an entry of the section "Attributes" of the class or of
    a base, which may name several fields ("mean, std: ...").
    """
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if issubclass(base, Settings) and base is not Settings:
            found |= dict(_entries(base)) | dict(_strings(base))
    return found


def _entries(model: type[Settings]) -> Iterator[tuple[str, str]]:
    """Yield the fields and texts of the section "Attributes"."""
    section = ((model.__doc__ and inspect.getdoc(model)) or "").partition("\nAttributes:\n")[2]
    section = re.split(r"\n(?=\S)", section)[0]
    for entry in re.split(r"\n(?=    \w)", section):
        match = _ENTRY.match(entry)
        if match is not None:
            text = " ".join([match[2], *(line.strip() for line in entry.splitlines()[1:])]).strip()
            yield from ((name, text) for name in match[1].split(", "))


def _strings(model: type[Settings]) -> Iterator[tuple[str, str]]:
    """Yield the fields that a string under their definition describes, with that string."""
    body = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    for node, following in zip(body.body, body.body[1:], strict=False):
        described = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and described:
            yield node.target.id, inspect.cleandoc(str(following.value.value))  # type: ignore[attr-defined]
