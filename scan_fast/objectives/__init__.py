"""Clustering objectives: one file each, and one line in the table below (see docs/extending/objective.md)."""

from typing import Annotated

from pydantic import Field

from ..schema import BARE_KIND
from .base import Heads, Objective, ObjectiveSettings
from .scan import SCAN, SCANSettings
from .temi import TEMI, TEMISettings
from .turtle import TURTLE, TURTLESettings

ObjectiveConfig = Annotated[
    SCANSettings | TEMISettings | TURTLESettings,
    Field(discriminator="kind"),
    BARE_KIND,
]
"""The type of ``clustering.objective``: the settings of one objective, chosen by ``kind``."""

__all__ = [
    "SCAN",
    "TEMI",
    "TURTLE",
    "Heads",
    "Objective",
    "ObjectiveConfig",
    "ObjectiveSettings",
    "SCANSettings",
    "TEMISettings",
    "TURTLESettings",
]
