"""Plans the epochs of each stage for a given time, from a short measurement of each stage."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scan_fast.data.datasets import Splits
from scan_fast.data.loader import epoch_batches, steps_per_epoch
from scan_fast.models.heads import ClusterModel, PretextModel
from scan_fast.random import stream_key
from scan_fast.runs.artifacts import PRETEXT_MODEL
from scan_fast.runs.config import Config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import StageResult
from scan_fast.runs.tracker import Tracker
from scan_fast.stages import clustering, mining, pretext, selflabel
from scan_fast.stages.embedding import backbone_features, embed
from scan_fast.stages.handover import Handover
from scan_fast.training.context import Context, open_context, seeded
from scan_fast.training.loop import Stage
from scan_fast.training.optimizers import build_optimizer, write_learning_rate
from scan_fast.training.process import kept_memory
from scan_fast.training.step import TrainingStep

WARM_UP_STEPS = 4  # cuDNN chooses its kernels, a captured step records its graph
# On trained features k-means needs more rounds than on those of the measurement.
KMEANS_FACTOR = 1.5


class TooShort(ValueError):
    """The time is too short for one epoch of each stage."""


@dataclass(frozen=True)
class Speeds:
    """Seconds of an epoch of each stage, with its share of the checks in between, and of everything that runs once.

    Attributes:
        epochs: by stage.
        once: mining, the k-means start and each stage's last evaluation.
    """

    epochs: dict[str, float]
    once: float

    def seconds(self, epochs: Mapping[str, int]) -> float:
        """Return the seconds of a run with the given epochs of each stage."""
        return self.once + sum(count * self.epochs[name] for name, count in epochs.items())


def plan_epochs(full: Mapping[str, int], speeds: Speeds, available: float) -> dict[str, int]:
    """Return epochs per stage that fit the available seconds, about the same share of each stage's full number.

    More time never gives a stage fewer epochs. No stage gets more than its full number, nor less than one.

    Raises:
        TooShort: if one epoch of each stage takes longer; the message says how much is needed.
    """
    epochs = dict.fromkeys(full, 1)
    if speeds.seconds(epochs) > available:
        parts = ", ".join(f"{name} {speeds.epochs[name]:.1f} s" for name in full)
        raise TooShort(
            f"{max(available, 0):.0f} s are left, but one epoch of each stage takes {speeds.seconds(epochs):.0f} s "
            f"({parts}, everything else {speeds.once:.1f} s)"
        )
    # One fixed order of further epochs, whatever the time; the time decides only how far it is followed.
    further = sorted((count / full[name], name) for name in full for count in range(2, full[name] + 1))
    for _, name in further:
        longer = epochs | {name: epochs[name] + 1}
        if speeds.seconds(longer) > available:
            break
        epochs = longer
    return epochs


def scaled(config: Config, epochs: Mapping[str, int]) -> dict[str, Any]:
    """Return the changes (dotted keys) that give a configuration the epochs, with its warm-up in proportion."""
    changes: dict[str, Any] = {}
    for name, count in epochs.items():
        training = getattr(config, name)
        changes[f"{name}.epochs"] = count
        if training.schedule.warmup_epochs:
            share = training.schedule.warmup_epochs / training.epochs
            changes[f"{name}.schedule.warmup_epochs"] = min(count - 1, max(1, round(share * count)))
    return changes


def learned_stages(config: Config) -> dict[str, int]:
    """Return the epochs of the stages that train, by name."""
    names = [pretext.NAME, clustering.NAME, *([selflabel.NAME] if config.selflabel else [])]
    return {name: getattr(config, name).epochs for name in names}


def measure(config: Config, splits: Splits, folder: Path, seconds: float = 1.5) -> Speeds:
    """Time some steps of each stage, and everything that runs once, with the driver's code and untrained weights.

    Args:
        config: of the run to come.
        splits: its images.
        folder: gets a run folder, which is removed afterwards.
        seconds: approximate duration of the measurement of each stage, after its first steps.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with RunFolder.open(folder, config) as run, kept_memory():
            return _measure(open_context(config, run, Tracker(run, quiet=True), splits), seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(context: Context, seconds: float) -> Speeds:
    config, run = context.config, context.run
    with seeded(config.seed, pretext.NAME):
        network = context.place(PretextModel(context.model_config))
    method = pretext.build_method(context, network)
    handover = Handover()
    found = {pretext.NAME: epoch_seconds(pretext.Pretext(context, network, method, handover), context, seconds)}

    # The test images come first and warm up; the training images are then timed.
    embed(context, network, "test", handover)
    embedding = _timed(context, lambda: embed(context, network, "train", handover))
    per_image = embedding / len(context.splits.train)
    check = per_image * len(context.clustered["test"])
    run.write(PRETEXT_MODEL, StageResult(network.state_dict()))
    run.finish_stage(pretext.NAME, 0.0, {}, config.seed)
    once = 2 * (embedding + check) + _timed(context, lambda: mining.run_mining(context, handover))

    with seeded(config.seed, clustering.NAME):
        model = context.place(ClusterModel(context.without_pretrained, context.n_clusters, config.clustering.heads))
    if config.clustering.initialize == "kmeans":
        model.backbone.load_state_dict(network.backbone.state_dict())
        backbone_features(context, model, "train", handover)
        one_head = model.head(0)
        start = _timed(context, lambda: clustering.start_from_kmeans(context, one_head, handover))
        once += embedding + KMEANS_FACTOR * config.clustering.heads * start
    found[clustering.NAME] = epoch_seconds(clustering.Clustering(context, model, handover), context, seconds)
    found[clustering.NAME] += check / config.clustering.evaluate_every
    if config.selflabel is not None:
        stage = selflabel.SelfLabel(context, model.head(0), handover)
        found[selflabel.NAME] = epoch_seconds(stage, context, seconds) + check / config.selflabel.evaluate_every
        once += embedding + check
    return Speeds(found, once)


def _timed(context: Context, do: Any) -> float:
    synchronize(context)
    begin = time.perf_counter()
    do()
    synchronize(context)
    return time.perf_counter() - begin


def synchronize(context: Context) -> None:
    """Wait for the run's device."""
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def epoch_seconds(stage: Stage[Any], context: Context, seconds: float) -> float:
    """Return the seconds of an epoch of a stage, from some steps with a learning rate of zero."""
    training = stage.training
    optimizer = build_optimizer(stage.parameters(), training.optimizer)
    write_learning_rate(optimizer, 0.0)
    capture = context.config.runtime.cuda_graphs and context.device.type == "cuda"
    do_step = TrainingStep(stage, optimizer, context.autocast, capture=capture, say=lambda _: None)
    stage.prepare()
    stage.train_mode()
    batches = _endless(stage, context)

    def steps(count: int) -> float:
        synchronize(context)
        begin = time.perf_counter()
        for _ in range(count):
            epoch, indices = next(batches)
            do_step(stage.batch(epoch, indices))
        synchronize(context)
        return time.perf_counter() - begin

    if context.device.type == "cuda":
        steps(WARM_UP_STEPS)
    per_step = steps(1)
    if per_step < seconds:
        count = min(50, math.ceil(seconds / per_step))
        per_step = steps(count) / count
    return per_step * steps_per_epoch(stage.n_images, training.batch_size)


def _endless(stage: Stage[Any], context: Context) -> Iterator[tuple[int, Tensor]]:
    key, epoch = stream_key(context.config.seed, stage.name), 0
    while True:
        for indices in epoch_batches(key, epoch, stage.n_images, stage.training.batch_size):
            yield epoch, indices
        epoch += 1


def to_plain(speeds: Speeds) -> dict[str, Any]:
    """Return speeds as plain values for a JSON file."""
    return asdict(speeds)
