"""No pretext training: a pretrained backbone as its library delivers it, or one that has nothing to train."""

from __future__ import annotations

from typing import ClassVar, Literal

from ..models.backbones import ModelConfig
from ..models.heads import PretextModel
from .base import MethodSettings


class NoneSettings(MethodSettings):
    """The backbone as it is; nothing is trained. The projector stays random, so mining must not use it."""

    kind: Literal["none"] = "none"
    trains: ClassVar[bool] = False

    def check(self, model: ModelConfig, features: str) -> None:
        """Require a backbone that is pretrained or a descriptor, and mining in the backbone's space."""
        if model.learns and not model.has_weights:
            raise ValueError(
                "pretext.method=none takes the backbone as it is, so it needs model.pretrained=true, "
                "model.weights=FILE, the short name of a pretrained backbone, or model.backbone=descriptor"
            )
        if features == "projection":
            raise ValueError("pretext.method=none has no trained projector, so it needs mining.features=backbone")

    def load(self, model: PretextModel) -> None:
        """Leave the model as it is."""
