"""The strict base of every configuration model."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen configuration section: unknown keys are errors, and defaults are checked like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
