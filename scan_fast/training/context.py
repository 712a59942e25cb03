"""The context of a run: configuration, run folder, images and device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import distributed
from ..data.agreement import in_turn
from ..data.datasets import DataConfig, Splits, open_splits
from ..data.order import check_ranks
from ..data.placement import move_to_device
from ..data.sources import Source
from ..devices import choose_device
from ..errors import ConfigError, DataError
from ..models.backbones import ModelConfig, check_image_size
from ..models.pretrained import InputFormat, prepare_weights, pretrained_input
from ..models.sync_batch_norm import synchronized
from ..random import stream_key
from ..runs import artifacts
from ..runs.config import Config, TrainingConfig
from ..runs.folder import RunFolder
from ..runs.records import PrecisionRecord
from ..runs.tracker import Tracker
from ..views.maker import Renderer, ViewMaker
from ..views.parameters import PlainView, View
from ..views.renderers import make_renderer
from .environment import environment, note_environment
from .images import all_equal, check_images, check_ranks_agree
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
    input: InputFormat | None = None
    """Images as the weights that the run starts from expect them; None for random weights."""
    left_out: Sequence[str] = ()
    """Entries of ``model.weights`` that the backbone has no place for."""

    @property
    def clustered(self) -> dict[str, Source]:
        """The splits that are clustered, by name, in the order of assignments.csv."""
        test = {} if self.splits.test is None else {"test": self.splits.test}
        return {"train": self.splits.train, **test}

    @property
    def used(self) -> dict[str, Source]:
        """The splits that the run learns from or reports, by name: the clustered ones and, if there is one, pretext."""
        return self.clustered | ({} if self.splits.pretext is None else {"pretext": self.splits.pretext})

    @property
    def reported(self) -> str:
        """The split that metrics, baselines and the choice of a head are of: "test", or "train" if there is no test."""
        return "train" if self.splits.test is None else "test"

    @property
    def counts_by_split(self) -> dict[str, int]:
        """The numbers of images that are clustered, by split."""
        return {split: len(source) for split, source in self.clustered.items()}

    @property
    def counts(self) -> str:
        """The numbers of images in words."""
        train, test = self.splits.train, self.splits.test
        return f"{len(train)} images" if test is None else f"{len(train)} training and {len(test)} test images"

    @property
    def model_config(self) -> ModelConfig:
        """The model section with ``backbone: auto`` resolved from the image size, built for the plain view's size."""
        side = self.config.clustering.view.size or self.side
        model = resolved_model(self.config.model, self.splits.train.size).for_images(side)
        # Features are grouped by direction, and so is what the head of the groups sees.
        return model if self.config.clustering.trains else model.model_copy(update={"unit_features": True})

    @property
    def side(self) -> int:
        """The side in pixels of views that name none.

        If the weights that the run starts from choose the image size, it is theirs, and views are cut out of slightly
        larger images as in the weights' training. Otherwise it is the images' size.
        """
        chosen = None if self.config.data.image_size is not None or self.input is None else self.input.size
        return chosen or self.splits.train.size

    @property
    def without_pretrained(self) -> ModelConfig:
        """The model section with random weights, for a network whose weights come from this run."""
        return self.model_config.from_scratch()

    @property
    def suggests_number(self) -> bool:
        """True if the run itself suggests the number of clusters, after mining."""
        wanted = self.config.clustering.n_clusters
        names = self.splits.train.class_names
        return wanted == "auto" or (wanted is None and (names is None or len(names) < 2))

    @property
    def n_clusters(self) -> int:
        """The number of clusters: as configured, as many as there are classes, or as suggested.

        Raises:
            RunError: if it is to be suggested and that has not been done.
        """
        if self.suggests_number:
            self.run.require(artifacts.SUGGESTION)
            return self.run.read(artifacts.SUGGESTION).k
        wanted = self.config.clustering.n_clusters
        if isinstance(wanted, int):
            return wanted
        names = self.splits.train.class_names
        assert names is not None
        return len(names)

    @property
    def n_classes(self) -> int | None:
        """The number of classes, or None without labels."""
        names = self.splits.train.class_names
        return None if names is None or self.splits.train.labels is None else len(names)

    def place(self, model: M) -> M:
        """Move a model to the device, in the channels-last layout of the views.

        With several ranks its batch normalisation takes the statistics of all of them in training, unless
        ``model.sync_batch_norm`` is false.
        """
        placed = model.to(self.device).to(memory_format=torch.channels_last)
        if distributed.several() and self.config.model.sync_batch_norm:
            synchronized(placed)
        return placed

    def view(self, view: View) -> View:
        """Return the view with an open size set to :attr:`side`."""
        return view.resolved(self.side)

    @property
    def plain_view(self) -> View:
        """The view for evaluation."""
        return self.view(PlainView(kind="plain", size=self.config.clustering.view.size))

    def groups_of(self, source: Source) -> Tensor | None:
        """Return the number of the shard of each image if ``data.shuffle`` is ``shards``, otherwise None."""
        return source.groups if self.config.data.shuffle == "shards" else None

    def views_of(self, source: Source, stage: str) -> ViewMaker:
        """Return the maker of a source's views with the stage's random numbers."""
        return ViewMaker(source, self.renderer, self.config.seed, stage, self.config.data.crop)

    @cached_property
    def precision(self) -> torch.dtype:
        """Compute dtype of convolutions and matrix products; resolves ``auto``.

        On a processor the choice (:mod:`.precision`) is noted in precision.json, so that a resumed run computes in the
        same dtype, on another machine too. With several ranks it is bfloat16 only if all of them find that right.
        """
        wanted = self.config.precision
        if wanted != "auto":
            return torch.bfloat16 if wanted == "bfloat16" else torch.float32
        if self.device.type == "cuda":
            return torch.bfloat16
        model, side = self.model_config, self.config.pretext.method.side(self.side)
        tried = {"model": model.model_dump(mode="json"), "side": side}
        if self.run.has(artifacts.PRECISION):
            record = self.run.read(artifacts.PRECISION)
            if record.tried == tried:
                return Choice(record.precision, record.reason).dtype
        choices = distributed.gathered(choose_on_cpu(model, side, trains=self.config.trains))
        choice = next((each for each in choices if each.precision == "float32"), choices[0])
        self.run.write(artifacts.PRECISION, PrecisionRecord(choice.precision, choice.reason, tried))
        self.tracker.say(f"precision: {choice.precision} ({choice.reason})")
        return choice.dtype

    def autocast(self) -> AbstractContextManager[None]:
        """Return the mixed-precision context of forward passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == torch.bfloat16)


def open_context(
    config: Config, run: RunFolder, tracker: Tracker, splits: Splits | None = None, *, other_images: bool = False
) -> Context:
    """Open the images, choose the device and check the configuration against the images.

    Weights that the run starts from are fetched or checked first, unless the stage that takes them is finished.

    Args:
        config: the configuration.
        run: the run folder.
        tracker: prints what was chosen, such as the memory that keeps the images.
        splits: the images; by default those that the configuration names.
        other_images: do not refuse images other than those that the run began with, as its results are to be removed.

    Raises:
        RunError: if the images have changed since the run began.
        ConfigError: if the device does not exist, or the images are too few for the configuration or too small
            for the backbone.
        DataError: if images cannot be read, or the renderer does not run on the device.
        WeightsError: if the weights cannot be fetched, or their file does not fit the backbone.
    """
    device = choose_device(config.runtime.device)
    set_threads(config.runtime.threads)
    devices = distributed.gathered(device.type)
    if len(set(devices)) > 1:
        raise ConfigError(
            f"rank 0 computes on {devices[0]}, rank {next(r for r, d in enumerate(devices) if d != devices[0])} does "
            "not: give every rank a GPU, or set runtime.device=cpu"
        )
    changed = note_environment(run, environment(device), afresh=other_images)
    if changed:
        tracker.say(f"environment changed: {'; '.join(changed)}; results may differ in their last bits")
    finished = run.finished("pretext")
    left_out = [] if finished else in_turn(lambda: prepare_weights(config.model))
    expected = weights_input(config)
    if splits is None:
        tracker.say(f"images: reading {config.data.root or config.data.source}")
        decode_cache = run.decode_cache()
        splits = open_splits(data_settings(config, expected), decode_cache)
        if decode_cache.changed:
            run.write(artifacts.DECODE_CACHE, decode_cache)
    sources = [source for source in (splits.train, splits.test, splits.pretext) if source is not None]
    if move_to_device(sources, config.data.resident, device):
        tracker.say(f"images: kept on {device}")
    elif not all(source.resident for source in sources):
        tracker.say("images: decoded from their files at each use (data.resident)")
    if splits.unused:
        more = f" and {len(splits.unused) - 3} more" if len(splits.unused) > 3 else ""
        tracker.say(f"images: {', '.join(splits.unused[:3])}{more} not used, beside the folders or files of the splits")
    splits = normalized(splits, config, expected)
    renderer = make_renderer(config.data, splits, device)
    context = Context(config, run, tracker, splits, device, renderer, expected, left_out)
    check_ranks_agree([splits.train, splits.test, splits.pretext])
    if not other_images:
        noted = check_images(run, context.used, config.data.identity)
        tracker.say(f"images: {len(noted.names):,}, digest {noted.digest}")
    check_sizes(context)
    check_batches(context)
    if distributed.several():
        _ = context.precision  # chosen by all ranks together, now
    return context


def check_sizes(context: Context) -> None:
    """Refuse images that are too few for the clusters or neighbours, or of a size that the backbone does not take."""
    config = context.config
    train, test = len(context.splits.train), context.splits.test
    images = "images" if test is None else "training images"
    if train < 3:
        raise DataError(f"{train} {images if train > 1 else images[:-1]} cannot be grouped; add images, at least 3")
    if not context.suggests_number and train <= context.n_clusters:
        raise ConfigError(
            f"{train} {images} are too few for {context.n_clusters} clusters; ask for 2 to {train - 1}, or add images"
        )
    if not context.suggests_number:
        config.clustering.objective.check(context.n_clusters)
    if config.clustering.trains and config.why_without("mining") is None and config.mining.k >= train:
        raise ConfigError(
            f"mining.k={config.mining.k} must be below the number of {images}, {train}; "
            f"use mining.k={max(1, min(20, train - 1))} or add images"
        )
    wanted = config.clustering.neighbors
    if wanted is not None and wanted > config.mining.k:
        raise ConfigError(f"clustering.neighbors={wanted} is more than the mining.k={config.mining.k} neighbours mined")
    if config.clustering.true_neighbors and context.splits.train.labels is None:
        raise ConfigError("clustering.true_neighbors=true draws neighbours by their labels, and these images have none")
    if test is not None and len(test) < 2:
        raise ConfigError(
            f"{len(test)} held-out image is too few to select a head by; raise data.test_fraction, set it to 0, "
            "or add images"
        )
    side = context.plain_view.side
    for size in sorted({side, config.pretext.method.side(context.side) if config.pretext.method.trains else side}):
        check_image_size(context.model_config, size)
    if all_equal(context.splits.train):
        raise DataError(f"all {train} {images} are the same picture; there is nothing to group")


def check_batches(context: Context) -> None:
    """Refuse batches that the ranks cannot divide equally."""
    world = distributed.current().world
    if not distributed.several():
        return
    config = context.config
    pretext = context.splits.pretext or context.splits.train
    stages: list[tuple[str, TrainingConfig | None, Source]] = [
        ("pretext", config.pretext if config.pretext.method.trains else None, pretext),
        ("clustering", config.clustering if config.clustering.trains else None, context.splits.train),
        ("selflabel", config.selflabel, context.splits.train),
    ]
    for name, training, source in stages:
        if training is None or config.why_without(name) is not None:
            continue
        batch = min(training.batch_size, len(source))
        if config.data.shuffle == "shards" and batch == training.batch_size:
            check_ranks(batch, world, f"{name}.batch_size")
        if batch % world:
            fitting = batch // world * world
            few = f" ({len(source)} images make one batch)" if batch < training.batch_size else ""
            wanted = f"set {name}.batch_size={fitting}" if fitting else "start fewer processes"
            raise ConfigError(
                f"{name}.batch_size={training.batch_size}{few} is the batch of all processes together, and {world} of "
                f"them cannot divide {batch} images equally; {wanted}"
            )


def resolved_model(model: ModelConfig, size: int) -> ModelConfig:
    """Return a model section with ``backbone: auto`` resolved for images of ``size`` pixels."""
    if model.backbone != "auto":
        return model
    backbone = "resnet18_cifar" if size <= 40 else "resnet18_stl" if size <= 112 else "torchvision:resnet18"
    return model.model_copy(update={"backbone": backbone})


def weights_input(config: Config) -> InputFormat | None:
    """Return the input format of the weights that a run starts from, None for random weights.

    Raises:
        ConfigError: if the library has no pretrained weights of that name.
        WeightsError: if the file of ``pretext.method=weights`` cannot be read.
    """
    if config.clustering.weights is not None:
        return None  # such files are of a data set, whose images they take as they are
    return pretrained_input(config.model) or config.pretext.method.input_format()


def data_settings(config: Config, expected: InputFormat | None) -> DataConfig:
    """Return the data section with an open image size and filter set to those of the weights.

    Args:
        config: the configuration.
        expected: the result of :func:`weights_input`.
    """
    data = config.data
    changes: dict[str, object] = {}
    if expected is None:
        return data
    if data.image_size is None and expected.size is not None:
        changes["image_size"] = expected.resize or expected.size
    if data.interpolation == "auto":
        changes["interpolation"] = expected.interpolation
    return data.model_copy(update=changes)


def normalized(splits: Splits, config: Config, expected: InputFormat | None) -> Splits:
    """Return the splits with the normalisation of the run.

    ``data.mean`` and ``data.std`` come first, then those of the weights that the backbone starts from, then those of
    the data set, which ``splits`` brings.

    Args:
        splits: the images.
        config: the configuration.
        expected: the result of :func:`weights_input`.
    """
    if expected is None:
        return splits
    return replace(splits, mean=config.data.mean or expected.mean, std=config.data.std or expected.std)


@contextmanager
def seeded(seed: int, stage: str) -> Iterator[None]:
    """Make weight initialisation a function of (seed, stage); torch's own generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_key(seed, f"{stage}/initialisation")[0])
        yield
