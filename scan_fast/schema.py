"""The strict base of every configuration model."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


class Settings(BaseModel):
    """A frozen configuration section: unknown keys are errors, and defaults are checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_boolean_numbers(cls, values: Any) -> Any:
        # pydantic reads true as 1, and YAML reads yes and on as true.
        if isinstance(values, dict):
            for name, field in cls.model_fields.items():
                if isinstance(values.get(name), bool) and bool not in (field.annotation, *get_args(field.annotation)):
                    raise ValueError(f"{name} must not be true or false")
        return values


BARE_KIND = BeforeValidator(lambda value: {"kind": value} if isinstance(value, str) else value)
"""Lets a section that is chosen by ``kind`` be given as the bare name: ``view: plain`` is ``view: {kind: plain}``."""
