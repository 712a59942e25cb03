"""Assigns new images to the clusters of a finished run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .data.datasets import DataConfig, Triple, source_from
from .data.placement import Crop
from .data.resize import Interpolation
from .data.sources import Source
from .errors import ConfigError, WeightsError
from .evaluation.typicality import Typicality
from .models.heads import ClusterModel
from .models.saved import SavedModel
from .runs import artifacts
from .views.inference import forward_views
from .views.maker import ViewMaker
from .views.parameters import PlainView
from .views.renderers import renderer_for

MOST_PIXELS = 1 << 28
"""Pixels in a batch: 512 images of 724 x 724, or fewer larger ones."""


@dataclass(frozen=True)
class ImageFormat:
    """Size, filter and normalisation of the images of a network.

    Attributes:
        size: side in pixels to which images are brought before anything else.
        view_size: side in pixels of the network's input.
        crop: "image" or "file", see ``data.crop``.
        decode: "exact" or "scaled", see ``data.decode``.
        mean, std: by channel, of pixel values in [0, 1].
        interpolation: the filter that brings images to ``size``.
    """

    size: int
    view_size: int
    crop: Crop
    decode: Literal["exact", "scaled"]
    mean: Triple
    std: Triple
    interpolation: Interpolation


class ImageNetwork:
    """A trained network with the renderer of its images.

    Args:
        model: the network, on any device; it is moved.
        form: how images are brought to it.
        device: the device of the network.

    Attributes:
        model: the network, in evaluation mode.
        device: its device.
        form: how images are brought to it.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, form: ImageFormat, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).eval()
        self.form = form
        self._renderer = renderer_for("auto", form.mean, form.std, self.device)
        self._view = PlainView(kind="plain", size=form.view_size)

    @property
    def size(self) -> int:
        """The side in pixels to which images are brought before anything else."""
        return self.form.size

    def source(self, images: Any, on_error: Literal["raise", "skip"] = "raise", setting: str = "images") -> Source:
        """Open images as :func:`.data.datasets.source_from` does, in the way of those that the model was trained on.

        Files are decoded at each use, for each is read once.

        Args:
            images: as in :func:`.data.datasets.source_from`.
            on_error: "skip" leaves unreadable images out and lists them in the source's ``skipped``.
            setting: what named the images, for errors.

        Raises:
            DataError: for images that cannot be read.
        """
        form = self.form
        config = DataConfig(
            image_size=form.size,
            interpolation=form.interpolation,
            resident="files",
            crop=form.crop,
            decode=form.decode,
            on_error=on_error,
            identity="quick",  # each file is read once, soon
        )
        return source_from(images, config, setting)

    def _forward(self, function: Callable[[Tensor], Tensor], source: Source, batch_size: int) -> Tensor:
        views = ViewMaker(source, self._renderer, 0, "evaluation", self.form.crop)
        # The sizes come from a file: a batch of the largest images would not fit into memory.
        side = max(self.form.size, self.form.view_size)
        batch_size = max(1, min(batch_size, MOST_PIXELS // side**2))
        return forward_views(self.model, function, views, self._view, batch_size).cpu()


class Predictor(ImageNetwork):
    """A trained cluster model with the renderer of its images.

    Args:
        saved: the content of a model.pt.
        device: the device of the network.

    Attributes:
        saved: the content of the model.pt.
        model: the network, in evaluation mode.
        device: its device.
        typicality: measures how far images are from the training images; None for a model.pt without that.

    Raises:
        WeightsError: if the weights do not fit the settings of the network.
    """

    model: ClusterModel

    def __init__(self, saved: SavedModel, device: torch.device | str = "cpu") -> None:
        self.saved = saved
        form = ImageFormat(**{field.name: getattr(saved, field.name) for field in fields(ImageFormat)})
        super().__init__(saved.build(), form, device)
        self.typicality: Typicality | None = None
        if saved.centers is not None and saved.least_similarity is not None:
            if saved.centers.shape[1] != self.model.out_features:
                raise WeightsError(
                    f"centers must have the {self.model.out_features} features of the network, "
                    f"they have {saved.centers.shape[1]}"
                )
            self.typicality = Typicality(saved.centers, saved.least_similarity)

    @property
    def n_clusters(self) -> int:
        """The number of clusters."""
        return self.saved.n_clusters

    def __reduce__(self) -> tuple[Any, ...]:
        # The saved model holds plain values and tensors on the CPU; the network and the renderer are made of it.
        return _unpickled, (self.saved, str(self.device))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Predictor:
        """Read a model.pt, or that of a run folder.

        Raises:
            WeightsError: if the file is missing, damaged or of another kind.
        """
        path = Path(path).expanduser()
        path = path / artifacts.MODEL.name if path.is_dir() else path
        if not path.is_file():
            raise WeightsError(f"there is no model at {path}; give a finished run folder or its model.pt")
        of_run = (path.parent / artifacts.CONFIG.name).is_file()
        advice = artifacts.MODEL.repair.format(folder=path.parent) if of_run else "copy it again from where it is whole"
        saved = artifacts.read(artifacts.MODEL, path, advice)
        try:
            return cls(saved, device)
        except (WeightsError, ConfigError) as error:
            raise WeightsError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a model.pt.

        Raises:
            OSError: if it cannot be written.
        """
        artifacts.write(artifacts.MODEL, self.saved, Path(path))

    def probabilities(self, source: Source, batch_size: int = 512) -> Tensor:
        """Return (N, K) float32 probabilities of the source's images, on the CPU."""
        return self.outputs(source, batch_size)[0]

    def features(self, source: Source, batch_size: int = 512) -> Tensor:
        """Return (N, D) float32 backbone features of the source's images, on the CPU."""
        return self._forward(self.model.features, source, batch_size)

    def outputs(self, source: Source, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """Return (N, K) float32 probabilities and (N, D) float32 features, on the CPU, from one pass.

        The features are those that the head sees: of length one if ``model.unit_features`` is set.
        """

        def both(images: Tensor) -> Tensor:
            features = self.model.features(images)
            if self.saved.model.unit_features:
                features = F.normalize(features, dim=1)
            return torch.cat([self.model.heads(features)[0], features], dim=1)

        logits, features = self._forward(both, source, batch_size).split_with_sizes(
            (self.n_clusters, self.model.out_features), dim=1
        )
        return logits.softmax(dim=1), features


def _unpickled(saved: SavedModel, device: str) -> Predictor:
    """Return a pickled predictor on its device, or on the CPU if this machine has no such device."""
    there = torch.device(device)
    missing = there.type == "cuda" and (there.index or 0) >= torch.cuda.device_count()
    with torch.random.fork_rng(devices=[]):  # the new network draws weights, which are then replaced
        return Predictor(saved, "cpu" if missing else there)
