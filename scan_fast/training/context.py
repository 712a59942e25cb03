"""The context of a run: configuration, run folder, images and device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import nn

from ..data.datasets import Splits, open_splits
from ..data.decode_cache import DecodeCache
from ..data.placement import move_to_device
from ..data.sources import Source
from ..devices import choose_device
from ..errors import ConfigError
from ..models.backbones import ModelConfig, check_image_size
from ..models.pretrained import pretrained_input
from ..random import stream_key
from ..runs import artifacts
from ..runs.config import Config
from ..runs.folder import RunFolder
from ..runs.records import PrecisionRecord
from ..runs.tracker import Tracker
from ..views.maker import Renderer, ViewMaker
from ..views.parameters import PlainView, View
from ..views.renderers import make_renderer
from .precision import Choice, choose_on_cpu
from .process import set_threads

M = TypeVar("M", bound=nn.Module)


@dataclass
class Context:
    """Everything that a stage may use. Built by :func:`open_context`."""

    config: Config
    run: RunFolder
    tracker: Tracker
    splits: Splits
    device: torch.device
    renderer: Renderer

    @property
    def clustered(self) -> dict[str, Source]:
        """The splits that are clustered, by name, in the order of assignments.csv."""
        return {"train": self.splits.train, "test": self.splits.test}

    @property
    def model_config(self) -> ModelConfig:
        """The model section with ``backbone: auto`` resolved from the image size."""
        return resolved_model(self.config.model, self.splits.train.size)

    @property
    def without_pretrained(self) -> ModelConfig:
        """The model section without pretrained weights, for a network whose weights come from this run."""
        return self.model_config.model_copy(update={"pretrained": False})

    @property
    def n_clusters(self) -> int:
        """The number of clusters: as configured, or as many as there are classes."""
        if self.config.clustering.n_clusters is not None:
            return self.config.clustering.n_clusters
        names = self.splits.train.class_names
        if names is None:
            raise ConfigError("the images have no classes to count: give the number of clusters with --clusters K")
        if len(names) < 2:
            raise ConfigError(
                f"the images have {len(names)} class folder; give --clusters K to say how many groups to look for"
            )
        return len(names)

    @property
    def n_classes(self) -> int | None:
        """The number of classes, or None without labels."""
        names = self.splits.train.class_names
        return None if names is None or self.splits.train.labels is None else len(names)

    def place(self, model: M) -> M:
        """Move a model to the device, in the channels-last layout of the views."""
        return model.to(self.device).to(memory_format=torch.channels_last)

    def view(self, view: View) -> View:
        """Return the view with an open size set to the images' size."""
        return view.resolved(self.splits.train.size)

    @property
    def plain_view(self) -> View:
        """The view for evaluation."""
        return self.view(PlainView(kind="plain", size=self.config.clustering.view.size))

    def views_of(self, source: Source, stage: str) -> ViewMaker:
        """Return the maker of a source's views with the stage's random numbers."""
        return ViewMaker(source, self.renderer, self.config.seed, stage, self.config.data.crop)

    @cached_property
    def precision(self) -> torch.dtype:
        """Compute dtype of convolutions and matrix products; resolves ``auto``.

        On a processor the choice (:mod:`.precision`) is noted in precision.json, so that a resumed run computes in the
        same dtype, on another machine too.
        """
        wanted = self.config.precision
        if wanted != "auto":
            return torch.bfloat16 if wanted == "bfloat16" else torch.float32
        if self.device.type == "cuda":
            return torch.bfloat16
        model, side = self.model_config, self.config.pretext.method.side(self.splits.train.size)
        tried = {"model": model.model_dump(mode="json"), "side": side}
        if self.run.has(artifacts.PRECISION):
            record = self.run.read(artifacts.PRECISION)
            if record.tried == tried:
                return Choice(record.precision, record.reason).dtype
        choice = choose_on_cpu(model, side)
        self.run.write(artifacts.PRECISION, PrecisionRecord(choice.precision, choice.reason, tried))
        self.tracker.say(f"precision: {choice.precision} ({choice.reason})")
        return choice.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Return the mixed-precision context of forward passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)


def open_context(config: Config, run: RunFolder, tracker: Tracker, splits: Splits | None = None) -> Context:
    """Open the images, choose the device and check the configuration against the images.

    Raises:
        ConfigError: if the device does not exist, or the images are too few for the configuration or too small
            for the backbone.
        DataError: if images cannot be read, or the renderer does not run on the device.
    """
    device = choose_device(config.runtime.device)
    set_threads(config.runtime.threads)
    if splits is None:
        decode_cache = run.read(artifacts.DECODE_CACHE) if run.has(artifacts.DECODE_CACHE) else DecodeCache()
        splits = open_splits(config.data, decode_cache)
        if decode_cache.changed:
            run.write(artifacts.DECODE_CACHE, decode_cache)
    sources = [source for source in (splits.train, splits.test, splits.pretext) if source is not None]
    if move_to_device(sources, config.data.resident, device):
        tracker.say(f"images: kept on {device}")
    elif not all(source.resident for source in sources):
        tracker.say("images: decoded from their files at each use (data.resident)")
    splits = normalized(splits, config)
    context = Context(config, run, tracker, splits, device, make_renderer(config.data, splits, device))
    check_sizes(context)
    return context


def check_sizes(context: Context) -> None:
    """Refuse images that are too few for the clusters or neighbours, or of a size that the backbone does not take."""
    config = context.config
    train, test = len(context.splits.train), len(context.splits.test)
    if train < context.n_clusters:
        raise ConfigError(f"{train} training images are fewer than the {context.n_clusters} clusters asked for")
    config.clustering.objective.check(context.n_clusters)
    if config.mining.k >= train:
        raise ConfigError(
            f"mining.k={config.mining.k} must be below the number of training images, {train}; "
            f"use mining.k={max(1, min(20, train - 1))} or add images"
        )
    wanted = config.clustering.neighbors
    if wanted is not None and wanted > config.mining.k:
        raise ConfigError(f"clustering.neighbors={wanted} is more than the mining.k={config.mining.k} neighbours mined")
    if test < 2:
        raise ConfigError(
            f"{test} held-out images are too few to select a head by; raise data.test_fraction or add images"
        )
    check_image_size(context.model_config, context.splits.train.size)


def resolved_model(model: ModelConfig, size: int) -> ModelConfig:
    """Return a model section with ``backbone: auto`` resolved for images of ``size`` pixels."""
    if model.backbone != "auto":
        return model
    backbone = "resnet18_cifar" if size <= 40 else "resnet18_stl" if size <= 112 else "torchvision:resnet18"
    return model.model_copy(update={"backbone": backbone})


def normalized(splits: Splits, config: Config) -> Splits:
    """Return the splits with the normalisation of the run.

    ``data.mean`` and ``data.std`` come first, then those of the weights that the backbone starts from, then those of
    the data set, which ``splits`` brings.
    """
    model = resolved_model(config.model, splits.train.size)
    expected = pretrained_input(model) or config.pretext.method.input_format()
    if expected is None:
        return splits
    return replace(splits, mean=config.data.mean or expected.mean, std=config.data.std or expected.std)


@contextmanager
def seeded(seed: int, stage: str) -> Iterator[None]:
    """Make weight initialisation a function of (seed, stage); torch's own generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, f"{stage}/initialisation")[0])
        yield
