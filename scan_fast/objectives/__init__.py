"""Clustering objectives: one file each, and one line in the table below (see docs/extending/objective.md)."""

from typing import Annotated

from ..schema import BARE_KIND
from .base import Heads, Objective, ObjectiveSettings
from .scan import SCAN, SCANSettings

ObjectiveConfig = Annotated[SCANSettings, BARE_KIND]  # from the second kind on: a union with a discriminator
"""The type of ``clustering.objective``: the settings of one objective, chosen by ``kind``."""

__all__ = ["SCAN", "Heads", "Objective", "ObjectiveConfig", "ObjectiveSettings", "SCANSettings"]
