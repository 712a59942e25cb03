"""The content of model.pt: a trained cluster model and what it needs to know about its images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any, BinaryIO, Literal, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from ..data.placement import Crop
from ..data.resize import Interpolation
from ..errors import ScanFastError, WeightsError, first_line
from .backbones import ModelConfig
from .heads import ClusterModel
from .tensor_files import read_tensors
from .weights import check_fits, is_state_dict, load_strict, unusable_entries

FORMAT = 1
LARGEST_SIDE = 4096
"""Largest side in pixels of the images of a saved model: a batch of larger ones takes the memory of a machine."""
MOST_CLUSTERS = 1_000_000
_BUFFERS = 1 << 30  # bytes of tables that a network computes itself, such as the distances of patches
_WEIGHTS = "the weights of the saved model"

Decode = Literal["exact", "scaled"]

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
    decode: Decode
    mean: Triple
    std: Triple
    state_dict: dict[str, Tensor]
    interpolation: Interpolation = "bilinear"
    centers: Tensor | None = None
    least_similarity: Tensor | None = None

    def build(self) -> ClusterModel:
        """Return the network with its weights, on the CPU. Nothing is downloaded, and no other file is read.

        Raises:
            WeightsError: if the weights do not fit the settings.
            ConfigError: if there is no such network.
        """
        settings = self.model.from_scratch()
        self._check_network(settings)
        model = ClusterModel(settings, self.n_clusters)
        load_strict(model, self.state_dict, what=_WEIGHTS)
        return model

    def _check_network(self, settings: ModelConfig) -> None:
        # Settings may ask for a network of any size: only one whose weights are all in the file takes memory.
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                model = ClusterModel(settings, self.n_clusters)
        except (ScanFastError, MemoryError):
            raise
        except Exception as error:  # the libraries of networks fail in many ways on impossible sizes
            raise WeightsError(f"the network of the saved model cannot be built: {first_line(error)[:200]}") from error
        check_fits(model, self.state_dict, what=_WEIGHTS)
        given = sum(value.nbytes for value in self.state_dict.values())
        needed = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
        if needed > 2 * given + _BUFFERS:
            raise WeightsError(f"the network of the saved model takes {needed} bytes, its weights are {given}")

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
        content = read_tensors(file)
        stated = content.get("format") if isinstance(content, dict) else None
        if not isinstance(stated, int) or stated != FORMAT:
            raise ValueError(f"it is no model.pt of scan-fast (format {FORMAT})")
        known = [field for field in fields(cls) if field.name in content or field.default is MISSING]
        missing = [field.name for field in known if field.name not in content]
        if missing:
            raise ValueError(f"it is no complete model.pt of scan-fast: it lacks {', '.join(missing)}")
        values: dict[str, Any] = {field.name: content[field.name] for field in known}
        try:
            # The weights are in the file: the settings name no others.
            values["model"] = ModelConfig.model_validate(values["model"]).from_scratch()
        except ValidationError as error:
            raise ValueError(f"its model settings are not valid: {error.errors()[0]['msg']}") from error
        for name, value in values.items():
            if name != "model" and not _CHECKS[name](value):
                raise ValueError(f"it is no sound model.pt of scan-fast: {name} cannot be {_brief(value)}")
        if values["model"].image_size is not None and values["model"].image_size > LARGEST_SIDE:
            raise ValueError(f"its network is said to be built for images of more than {LARGEST_SIDE} pixels a side")
        _check_centers(values["n_clusters"], values.get("centers"), values.get("least_similarity"))
        return cls(**{**values, **{name: tuple(map(float, values[name])) for name in ("mean", "std")}})


def _whole(least: int, most: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _triple(above: float) -> Callable[[Any], bool]:
    return lambda value: (
        isinstance(value, tuple | list)
        and len(value) == 3
        and all(isinstance(each, int | float) and math.isfinite(each) and each > above for each in value)
    )


def _one_of(kind: Any) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in get_args(kind)


def _is_table(value: Any) -> bool:
    return value is None or (isinstance(value, Tensor) and not unusable_entries({"": value}))


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "stage": lambda value: isinstance(value, str) and len(value) < 100,
    "n_clusters": _whole(2, MOST_CLUSTERS),
    "size": _whole(1, LARGEST_SIDE),
    "view_size": _whole(1, LARGEST_SIDE),
    "crop": _one_of(Crop),
    "decode": _one_of(Decode),
    "mean": _triple(-math.inf),
    "std": _triple(0.0),
    "state_dict": is_state_dict,
    "interpolation": _one_of(Interpolation),
    "centers": _is_table,
    "least_similarity": _is_table,
}


def _check_centers(n_clusters: int, centers: Tensor | None, least: Tensor | None) -> None:
    if centers is None and least is None:
        return
    if (
        centers is None
        or least is None
        or centers.ndim != 2
        or len(centers) != n_clusters
        or least.shape != (n_clusters,)
        or not (centers.is_floating_point() and least.is_floating_point())
        or not bool(torch.isfinite(centers).all() and torch.isfinite(least).all())
    ):
        raise ValueError(f"it is no sound model.pt of scan-fast: its centers are not those of {n_clusters} clusters")


def _brief(value: Any) -> str:
    if isinstance(value, str | int | float | None):
        text = hex(value) if isinstance(value, int) and abs(value) > 1 << 64 else repr(value)
        return text if len(text) <= 40 else f"{text[:40]}..."
    return f"a {type(value).__name__}"
