"""Files of the original SCAN project and of MoCo v2 as models: with the images of a configuration.

Such a file holds tensors only. What its network sees, such as the size and the normalisation of the images, is in a
configuration: a shipped one such as ``cifar10``, or a YAML file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .data.datasets import STATISTICS, Splits, open_splits
from .errors import UsageError, WeightsError
from .models.backbones import ModelConfig
from .models.heads import ClusterModel, PretextModel
from .models.reference_checkpoints import OriginalWeights, load_original, read_original
from .models.saved import SavedModel
from .predictor import ImageFormat, ImageNetwork, Predictor
from .runs.config import Config, change_config, find_config, load_config, parse_override, presets_of
from .training.context import data_settings, normalized, resolved_model, weights_input

PRESET = "paper"
"""The preset that files of the reference belong to, if the configuration has it."""

SIDES = {"digits": 8, "cifar10": 32, "cifar20": 32, "stl10": 96, "tinyimagenet": 64, "imagenet": 224}
"""Side in pixels of the images of each data set, if ``data.image_size`` is not set."""
BACKBONE_SIDES = {"resnet18_cifar": 32, "resnet18_stl": 96, "resnet50": 256}
"""The same for other images, by what the network was made for."""


class Embedder(ImageNetwork):
    """The network of a pretext file, which maps images to vectors.

    Args:
        model: the network.
        form: how images are brought to it.
        features: "projection" (the projector's output) or "backbone", as ``mining.features``.
        device: the device of the network.
    """

    model: PretextModel

    def __init__(
        self, model: PretextModel, form: ImageFormat, features: str, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(model, form, device)
        self._function = model if features == "projection" else model.features

    def features(self, source: Any, batch_size: int = 512) -> Tensor:
        """Return (N, D) float32 vectors of the source's images, on the CPU, not normalised."""
        return self._forward(self._function, source, batch_size)


class OneHead(Predictor):
    """A predictor that knows the features of one source's images, so that they are computed once.

    Args:
        saved: the model.
        device: the device of the network.
        source: the images.
        features: (N, D) float32, what :meth:`.Predictor.features` returns for them.
    """

    def __init__(self, saved: SavedModel, device: torch.device | str, source: Any, features: Tensor) -> None:
        super().__init__(saved, device)
        self._known = source, features

    def features(self, source: Any, batch_size: int = 512) -> Tensor:
        """Return what is known, or compute it."""
        return self._known[1] if source is self._known[0] else super().features(source, batch_size)

    @torch.no_grad()
    def outputs(self, source: Any, batch_size: int = 512) -> tuple[Tensor, Tensor]:
        """Return probabilities and features, from the features if they are known."""
        if source is not self._known[0]:
            return super().outputs(source, batch_size)
        features = self._known[1]
        rows = [self.model.heads(part.to(self.device))[0].cpu() for part in features.split(batch_size)]
        probabilities = torch.cat(rows).softmax(dim=1)
        return probabilities, F.normalize(features, dim=1) if self.saved.model.unit_features else features


@dataclass(frozen=True)
class ReferenceFile:
    """A file of the reference and the configuration that says what its network sees.

    Attributes:
        path: the file.
        weights: its content.
        config: the configuration with what the file decides: the projector, or the number of clusters.
        stated_clusters: ``clustering.n_clusters`` of the configuration itself.
    """

    path: Path
    weights: OriginalWeights
    config: Config
    stated_clusters: int | str | None

    @property
    def is_pretext(self) -> bool:
        """True if the file has no cluster heads."""
        return self.weights.n_heads == 0

    def splits(self) -> Splits:
        """Open the images of the configuration.

        Raises:
            DataError: if they cannot be read.
        """
        expected = weights_input(self.config)
        return normalized(open_splits(data_settings(self.config, expected)), self.config, expected)

    def model_config(self, size: int) -> ModelConfig:
        """Return the settings of the network for images that are stored with a side of ``size`` pixels."""
        model = self.config.model.from_scratch()
        if model.backbone == "auto" and self.weights.architecture == "resnet50":
            return model.model_copy(update={"backbone": "resnet50"})
        return resolved_model(model, size)

    def image_format(self, splits: Splits | None = None) -> ImageFormat:
        """Return how images are brought to the network. Without opened images, none are opened for it."""
        config, expected = self.config, weights_input(self.config)
        data = data_settings(config, expected)
        if splits is None:
            default = BACKBONE_SIDES.get(config.model.backbone, 256 if self.weights.architecture == "resnet50" else 32)
            size = data.image_size or SIDES.get(data.source, default)
            mean, std = STATISTICS.get(data.source, STATISTICS["imagenet"])
            if expected is not None:
                mean, std = expected.mean, expected.std
            mean, std = data.mean or mean, data.std or std
        else:
            size, mean, std = splits.train.size, splits.mean, splits.std
        chosen = None if config.data.image_size is not None or expected is None else expected.size
        if chosen is None and self.weights.architecture == "resnet50" and size >= 224:
            chosen = 224  # the reference cuts it out of 256
        side = config.clustering.view.size or chosen or size
        return ImageFormat(size, side, data.crop, data.decode, mean, std, data.filter)

    def embedder(self, device: torch.device | str = "cpu", splits: Splits | None = None) -> Embedder:
        """Return the network of a pretext or MoCo file.

        Args:
            device: its device.
            splits: the opened images, if there are any.

        Raises:
            WeightsError: if the file holds another network than the configuration, or cluster heads.
        """
        if not self.is_pretext:
            raise WeightsError(f"{self.path} holds cluster heads, no projector")
        form = self.image_format(splits)
        settings = self.model_config(form.size)
        with torch.random.fork_rng(devices=[]):
            model = PretextModel(settings)
        load_original(model, self.weights, self.weights.state_dict, self.path, settings)
        return Embedder(model, form, self.config.mining.features, device)

    def predictor(
        self, head: int | None = None, device: torch.device | str = "cpu", splits: Splits | None = None
    ) -> Predictor:
        """Return the predictor of one head of a SCAN or self-label file.

        Args:
            head: the index of the head; None: the one that the file names as the best.
            device: its device.
            splits: the opened images, if there are any.

        Raises:
            WeightsError: if the file holds another network than the configuration, no cluster heads, or several heads
                without a best one.
        """
        form = self.image_format(splits)
        settings = self.model_config(form.size)
        try:
            state_dict = self.weights.with_head(head)
        except WeightsError as error:
            raise WeightsError(f"{self.path}: {error}") from error
        n_clusters = self.weights.n_clusters
        assert n_clusters is not None
        with torch.random.fork_rng(devices=[]):
            model = ClusterModel(settings, n_clusters)
        load_original(model, self.weights, state_dict, self.path, settings)
        stage = "selflabel" if self.weights.kind == "selflabel" else "clustering"
        saved = SavedModel(stage, settings, n_clusters, state_dict=state_dict, **vars(form))
        return Predictor(saved, device)

    def with_features(self, predictor: Predictor, head: int, source: Any, features: Tensor) -> OneHead:
        """Return the predictor of another head, for images whose features are known."""
        saved = replace(predictor.saved, state_dict=self.weights.with_head(head))
        return OneHead(saved, predictor.device, source, features)

    def assumed(self, form: ImageFormat) -> dict[str, Any]:
        """Return what the configuration says of the network and its images, which the file does not show."""
        return {
            "configuration": self.config.name,
            "preset": self.config.preset,
            "backbone": self.model_config(form.size).backbone,
            "image_size": form.view_size,
            "stored_size": form.size,
            "mean": list(form.mean),
            "std": list(form.std),
        }

    def describe(self, form: ImageFormat) -> str:
        """Return one line that says what the file is, and what the configuration assumes of it."""
        what = {"pretext": "pretext", "moco": "MoCo", "scan": "SCAN", "selflabel": "self-label"}[self.weights.kind]
        facts = self.assumed(form)
        preset = f", preset {facts['preset']}" if facts["preset"] else ""
        stems = {"resnet18_cifar": "no max-pooling", "resnet18_stl": "one max-pooling"}
        stem = f" ({stems[facts['backbone']]})" if facts["backbone"] in stems else ""
        numbers = ", ".join(f"{value:g}" for value in form.mean)
        return (
            f"{self.path}: {what} weights; configuration {facts['configuration']}{preset} assumes "
            f"{facts['backbone']}{stem} and images of {form.view_size} x {form.view_size} pixels with mean {numbers}"
        )


def reference_config(name: str, overrides: Iterable[str] = ()) -> Config:
    """Read the configuration of a file of the reference: by default its preset ``paper``.

    Args:
        name: a shipped configuration or a YAML file.
        overrides: ``section.key=value`` words.

    Raises:
        ConfigError: if there is no such configuration, or it is not valid.
    """
    path, words = find_config(name), list(overrides)
    given = {key for key, _ in map(parse_override, words)}
    if "preset" not in given and PRESET in presets_of(path):
        words.insert(0, f"preset={PRESET}")
    return load_config(path, words)


def settings_from(path: Path, weights: OriginalWeights, head: int | None = None) -> dict[str, Any]:
    """Return the configuration values, by dotted key, of a run that starts from a file.

    Args:
        path: the file.
        weights: its content.
        head: the head to take; None: the one that the file names as the best.
    """
    file = str(path.expanduser().absolute())
    if not weights.n_heads:
        projector = {f"model.{key}": value for key, value in weights.projector.items()}
        return {"pretext.method": {"kind": "weights", "file": file}, **projector}
    settings: dict[str, Any] = {"clustering.weights": file, "clustering.n_clusters": weights.n_clusters}
    return settings if head is None else {**settings, "clustering.weights_head": head}


def open_reference(
    path: str | Path, config: str | Config, overrides: Iterable[str] = (), head: int | None = None
) -> ReferenceFile:
    """Open a weight file of the original SCAN project, or of MoCo v2.

    Args:
        path: a pretext, SCAN or self-label file (``model.pth.tar``, ``checkpoint.pth.tar``), or MoCo's checkpoint.
            Nothing but tensors and plain values is read, so that a foreign file cannot run code.
        config: a shipped configuration such as "cifar10", a YAML file (both with the preset ``paper`` if they have
            it), or a configuration.
        overrides: ``section.key=value`` words, for a configuration by name.
        head: the head of a SCAN file that is to be used.

    Raises:
        WeightsError: if the file cannot be read.
        ConfigError: if the configuration is not valid.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise UsageError(f"{path} is a folder; a configuration goes with a weight file of the SCAN project")
    weights = read_original(path)
    base = config if isinstance(config, Config) else reference_config(config, overrides)
    changes = settings_from(path, weights, head)
    if weights.n_heads:
        changes |= {"clustering.update": "full", "clustering.cached_views": None, "mining.files": None}
    changed = change_config(base, changes.items())
    return ReferenceFile(path, weights, changed, base.clustering.n_clusters)
