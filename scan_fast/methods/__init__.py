"""Pretext methods: one file each, and one line in the table below (see docs/extending/pretext-method.md)."""

from typing import Annotated

from pydantic import Field

from ..schema import BARE_KIND
from .base import MethodSettings, PretextMethod
from .byol import BYOLSettings
from .moco import MoCoSettings
from .multi_view import MultiViewSettings
from .none import NoneSettings
from .rotation import RotationSettings
from .sigreg import SIGRegSettings
from .simclr import SimCLR, SimCLRSettings
from .visreg import VISRegSettings
from .weights import WeightsSettings

MethodConfig = Annotated[
    SimCLRSettings
    | MoCoSettings
    | BYOLSettings
    | SIGRegSettings
    | VISRegSettings
    | RotationSettings
    | WeightsSettings
    | NoneSettings,
    Field(discriminator="kind"),
    BARE_KIND,
]
"""The type of ``pretext.method``: the settings of one method, chosen by ``kind``."""

__all__ = [
    "BYOLSettings",
    "MethodConfig",
    "MethodSettings",
    "MoCoSettings",
    "MultiViewSettings",
    "NoneSettings",
    "PretextMethod",
    "RotationSettings",
    "SIGRegSettings",
    "SimCLR",
    "SimCLRSettings",
    "VISRegSettings",
    "WeightsSettings",
]
