"""Weights from a file instead of training."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from ..errors import WeightsError
from ..models.backbones import ModelConfig
from ..models.heads import PretextModel
from ..models.pretrained import IMAGENET_MEAN, IMAGENET_STD, InputFormat
from ..models.reference_checkpoints import load_original, read_original
from .base import MethodSettings


class WeightsSettings(MethodSettings):
    """Pretext weights of the reference project or of official MoCo v2, read from a file; nothing is trained.

    Attributes:
        file: the weight file. All names and shapes must fit the model.
    """

    kind: Literal["weights"] = "weights"
    file: Path
    trains: ClassVar[bool] = False

    @field_validator("file")
    @classmethod
    def _absolute(cls, file: Path) -> Path:
        # A run continues from any folder.
        return file.expanduser().absolute()

    def check(self, model: ModelConfig, features: str) -> None:
        """Refuse other weights, which this file would replace."""
        if model.weights is not None:
            raise ValueError(f"pretext.method=weights reads {self.file}, so model.weights={model.weights} has no use")

    def input_format(self) -> InputFormat | None:
        """Return ImageNet's format for MoCo weights; the reference's weights go with their data set's."""
        original = read_original(self.file)
        return InputFormat(IMAGENET_MEAN, IMAGENET_STD, 224, 256) if original.kind == "moco" else None

    def load(self, model: PretextModel) -> None:
        """Fill a model with the file's weights.

        Raises:
            WeightsError: if there is no such file, or it holds no pretext weights, or weights of another network.
        """
        original = read_original(self.file)
        if original.kind not in ("pretext", "moco"):
            raise WeightsError(
                f"pretext.method.file={self.file} holds a {original.kind} model; stage one needs a pretext model"
            )
        load_original(model, original, original.state_dict, self.file, model.config)
