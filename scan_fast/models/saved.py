"""The content of model.pt: a trained cluster model and what it needs to know about its images."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any, BinaryIO, Literal

import torch
from pydantic import ValidationError
from torch import Tensor

from ..data.placement import Crop
from ..data.resize import Interpolation
from .backbones import ModelConfig
from .heads import ClusterModel
from .weights import load_strict

FORMAT = 1

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class SavedModel:
    """A cluster model with one head.

    Attributes:
        stage: the stage whose result it is.
        model: the settings of the network.
        n_clusters: the number of clusters.
        size: the side in pixels to which images are brought before anything else.
        view_size: the side in pixels of the network's input.
        crop: "image", "file" or "whole", see ``data.crop``.
        decode: "exact" or "scaled", see ``data.decode``.
        mean: by channel, of pixel values in [0, 1].
        std: likewise.
        state_dict: the weights, on the CPU.
        interpolation: the filter that brings images to ``size``, see ``data.interpolation``.
        centers, least_similarity: see :class:`scan_fast.evaluation.typicality.Typicality`; None in files
            that were written before it.
    """

    stage: str
    model: ModelConfig
    n_clusters: int
    size: int
    view_size: int
    crop: Crop
    decode: Literal["exact", "scaled"]
    mean: Triple
    std: Triple
    state_dict: dict[str, Tensor]
    interpolation: Interpolation = "bilinear"
    centers: Tensor | None = None
    least_similarity: Tensor | None = None

    def build(self) -> ClusterModel:
        """Return the network with its weights, on the CPU.

        Raises:
            WeightsError: if the weights do not fit the settings.
        """
        model = ClusterModel(self.model, self.n_clusters)
        load_strict(model, self.state_dict, what="the weights of the saved model")
        return model

    def dump(self, file: BinaryIO) -> None:
        """Write a file of torch.save, for ``torch.load(weights_only=True)``."""
        content = {name: value for name, value in vars(self).items() if name != "model"}
        model = self.model.model_dump(mode="json")
        torch.save({"format": FORMAT, "model": model, **content}, file)

    @classmethod
    def load(cls, file: BinaryIO) -> SavedModel:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, OSError and more
            raise ValueError(f"it is damaged or no file of tensors ({type(error).__name__})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"it is no model.pt of scan-fast (format {FORMAT})")
        known = [field for field in fields(cls) if field.name in content or field.default is MISSING]
        missing = [field.name for field in known if field.name not in content]
        if missing:
            raise ValueError(f"it is no complete model.pt of scan-fast: it lacks {', '.join(missing)}")
        values: dict[str, Any] = {field.name: content[field.name] for field in known}
        try:
            values["model"] = ModelConfig.model_validate(values["model"])
        except ValidationError as error:
            raise ValueError(f"its model settings are not valid: {error.errors()[0]['msg']}") from error
        return cls(**values)
