"""The one training loop.

A stage defines its views, its loss, its state and the choice of its best weights. The loop does the rest: order of the
images, learning rate, updates, averages, checkpoints, resuming. Every random number is a function of (seed, stage,
epoch, sample, view). So a checkpoint needs no generator state, and a resumed run computes the same bits as one that was
never interrupted.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from .. import distributed
from ..data.loader import epoch_batches, prefetch, steps_per_epoch
from ..errors import DataError, RunError, first_line
from ..models.weights import load_strict
from ..random import stream_key
from ..runs import artifacts
from ..runs.artifacts import COMMANDS
from ..runs.config import ScheduleConfig, TrainingConfig
from ..runs.records import Checkpoint, map_tensors
from ..runs.writer import BackgroundWriter
from .compilation import compile_networks, timed_first_step
from .context import Context
from .optimizers import AnyOptimizer, build_optimizer, fit_to_device, write_learning_rate
from .parallel import Due, on_all_ranks, same_buffers
from .step import TrainingStep

Batch = TypeVar("Batch")


class Stage(ABC, Generic[Batch]):
    """Base of the learned stages: pretext, clustering and self-labelling.

    Attributes:
        name: the stage's name in files and on the screen.
        model: the network; all of it is checkpointed.
        training: epochs, batch size, optimiser, schedule.
        n_images: images per epoch.
        background: prepare batches in background threads, because reading the images takes time.
        groups: (n_images,) int64 number of the shard of each image, to read the shards one after another; None: the
            images come in any order.
    """

    name: str
    model: nn.Module
    training: TrainingConfig
    n_images: int
    background: bool = False
    groups: Tensor | None = None

    @abstractmethod
    def batch(self, epoch: int, indices: Tensor) -> Batch:
        """Return the batch of the images ``indices`` (B,) int64: a tensor or a tuple of tensors."""

    @abstractmethod
    def step(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise and the scalars to average over the epoch, all on the device."""

    def networks(self) -> list[nn.Module]:
        """Return the modules to compile if ``runtime.compile`` is set."""
        return [self.model]

    def modules(self) -> list[nn.Module]:
        """Return the modules whose parameters the optimiser updates."""
        return [self.model]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the optimiser updates."""
        return [parameter for module in self.modules() for parameter in module.parameters() if parameter.requires_grad]

    def prepare(self) -> None:
        """Run before the first step, after weights were initialised or loaded from a checkpoint."""

    def train_mode(self) -> None:
        """Set the model's mode for training."""
        self.model.train()

    def after_step(self) -> None:
        """Run after every update, for example to move an average."""

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Evaluate after ``epoch`` (from 1) if it is due, keep the best weights, and return further metrics."""
        return {}

    def finished(self) -> bool:
        """Return whether the stage needs no more epochs; asked between epochs."""
        return False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the model: plain values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""


@dataclass
class Training:
    """Result of :func:`train`.

    Attributes:
        seconds: time that the stage took, including the time before an interruption.
        notes: further entries for summary.json, such as the time of compilation.
    """

    seconds: float
    notes: dict[str, Any] = field(default_factory=dict)


def train(stage: Stage[Any], context: Context) -> Training:
    """Train a stage to its end, from its checkpoint if there is one.

    Raises:
        RunError: if the loss or a weight stops being finite; the last checkpoint, which is finite, stays.
    """
    run, tracker, training = context.run, context.tracker, stage.training
    checkpoint = artifacts.checkpoint(stage.name)
    key = stream_key(context.config.seed, stage.name)
    steps = steps_per_epoch(stage.n_images, training.batch_size)
    optimizer = build_optimizer(stage.parameters(), training.optimizer)
    # A graph that holds collectives of several processes is untested, so those run kernel by kernel.
    capture = context.config.runtime.cuda_graphs and context.device.type == "cuda" and not distributed.several()

    epoch, step, seconds = 0, 0, 0.0
    totals: Mapping[str, Tensor] | None = None
    if run.has(checkpoint):
        state = map_tensors(run.read(checkpoint), lambda tensor: tensor.to(context.device))
        if state.n_images != stage.n_images:
            raise RunError(
                f"{run.path_of(checkpoint)} is of {state.n_images} images, there are {stage.n_images} now; "
                "the images have changed since: start again in a new folder"
            )
        where = run.path_of(checkpoint)
        advice = f"remove it, and the stage begins again: scan-fast {COMMANDS[stage.name]} {run.path}"
        if state.images is not None and state.images != run.images_digest:
            raise RunError(f"{where} was made of other images than those of this run; {advice}")
        try:
            load_strict(stage.model, state.model, what=str(where))
            optimizer.load_state_dict(state.optimizer)
            fit_to_device(optimizer)
            stage.load_state(state.stage)
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise RunError(
                f"{where} is of another network or optimizer: {first_line(error)[:200]}; {advice}"
            ) from error
        epoch, step, seconds, totals = state.epoch, state.step, state.seconds, state.totals
        further = f", step {step}" if step else ""
        tracker.say(f"{stage.name}: going on after epoch {epoch}/{training.epochs}{further}")
    run.drop_metrics(stage.name, epoch + 1)
    asked, warmup = training.schedule.warmup_epochs, warmup_epochs(training.schedule, training.epochs)
    if warmup < asked:
        tracker.say(f"{stage.name}: warm-up cut from {asked} to {warmup:g} epochs, a fifth of all {training.epochs}")

    own_buffers = not context.config.model.sync_batch_norm
    compute = on_all_ranks(stage.step, stage.modules(), context.device, own_buffers=own_buffers)
    do_step = TrainingStep(stage, optimizer, context.autocast, capture=capture, say=tracker.say, compute=compute)
    if totals is not None:
        do_step.reset(totals)

    begin, due = time.perf_counter(), Due(lambda: context.config.runtime.checkpoint_seconds)
    if epoch < training.epochs and not stage.finished():
        stage.prepare()

    notes: dict[str, Any] = {}
    networks = stage.networks() if context.config.runtime.compile else []
    compile_networks(networks)
    compiling = bool(networks)

    def save(writer: BackgroundWriter) -> None:
        check_finite(stage, do_step.totals, epoch)
        writer.write(
            checkpoint,
            Checkpoint(
                model=stage.model.state_dict(),
                optimizer=optimizer.state_dict(),
                stage=stage.state(),
                n_images=stage.n_images,
                epoch=epoch,
                step=step,
                totals=do_step.totals,
                seconds=seconds + time.perf_counter() - begin,
                images=run.images_digest,
            ),
        )
        due.saved()

    with (
        BackgroundWriter(run) as writer,
        tracker.progress(stage.name, training.epochs * steps, epoch * steps + step) as ticker,
    ):
        while epoch < training.epochs and not stage.finished():
            stage.train_mode()
            try:
                for batch, size in _batches(stage, key, epoch, step):
                    set_learning_rate(optimizer, training, epoch, step, steps)
                    if compiling:
                        compiling, notes = False, {"compilation": timed_first_step(do_step, batch)}
                        tracker.say(
                            "{0}: compiled in {seconds:.1f} s, {cache} cache".format(stage.name, **notes["compilation"])
                        )
                    else:
                        do_step(batch)
                    step += 1
                    ticker.step(size)
                    if step < steps and due.after_step():
                        do_step.share_totals()
                        save(writer)
                do_step.share_totals()
                if own_buffers:
                    same_buffers(stage.modules())
                averages = do_step.averages(steps)
                check_finite(stage, do_step.totals, epoch)
                averages |= stage.end_epoch(epoch + 1, last=epoch + 1 == training.epochs)
            except DataError:  # an image that can no longer be read: once it can, training goes on from here
                save(writer)
                raise
            epoch, step = epoch + 1, 0
            do_step.reset()
            tracker.record(stage.name, epoch, epoch * steps, averages)
            ticker.epoch(epoch, training.epochs, averages)
            ended = epoch == training.epochs or stage.finished()
            if ended or due.after_epoch():
                save(writer)
    return Training(seconds + time.perf_counter() - begin, notes)


def check_finite(stage: Stage[Any], totals: Mapping[str, Tensor], epoch: int) -> None:
    """Refuse to go on, and to write a checkpoint, if the loss or a weight is not finite; the host waits for the device.

    Args:
        stage: its model is checked.
        totals: the sums of the epoch so far.
        epoch: from 0, for the message.

    Raises:
        RunError: names the learning rate to lower.
    """
    loss = totals.get("loss")
    problem = None
    if loss is not None and not math.isfinite(float(loss)):
        problem = f"the loss is {float(loss)}"
    else:
        weights = [value for value in stage.model.state_dict().values() if value.is_floating_point()]
        # The norm of any tensor with a NaN or an infinity is not finite, and one launch computes them all.
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(weights, float("inf"))])
        if not bool(norms.isfinite().all()):
            problem = "a weight is not finite"
    if problem is not None:
        raise RunError(
            f"{stage.name}: {problem} in epoch {epoch + 1}; lower {stage.name}.optimizer.lr "
            f"(now {stage.training.optimizer.lr:g}) and start again in a new folder"
        )


def _batches(stage: Stage[Any], key: tuple[int, int], epoch: int, start_step: int) -> Iterator[tuple[Any, int]]:
    ranks = distributed.current()
    orders = epoch_batches(
        key,
        epoch,
        stage.n_images,
        stage.training.batch_size,
        start_step=start_step,
        rank=ranks.rank,
        world=ranks.world,
        groups=stage.groups,
    )

    def prepare(indices: Tensor) -> tuple[Any, int]:
        return stage.batch(epoch, indices), len(indices) * ranks.world

    return prefetch(prepare, orders) if stage.background else map(prepare, orders)


def set_learning_rate(optimizer: AnyOptimizer, training: TrainingConfig, epoch: int, step: int, steps: int) -> None:
    """Set the learning rate for a step (from 0) of an epoch (from 0)."""
    schedule = training.schedule
    position, length = (epoch + step / steps, 1 / steps) if schedule.every == "step" else (epoch, 1.0)
    factor = learning_rate_factor(schedule, position, training.epochs, length)
    write_learning_rate(optimizer, training.optimizer.lr * factor)


def warmup_epochs(schedule: ScheduleConfig, epochs: int) -> float:
    """Return the length of the warm-up: as configured, but at most a fifth of ``epochs``."""
    return min(schedule.warmup_epochs, epochs / 5)


def learning_rate_factor(schedule: ScheduleConfig, position: float, epochs: int, length: float = 1.0) -> float:
    """Return the factor on the base rate after ``position`` epochs of ``epochs``.

    ``length`` is the part of an epoch for which a rate holds: one epoch, or one step of it.
    """
    warmup = warmup_epochs(schedule, epochs)
    if position < warmup:
        # The ramp starts one rate above zero, so that the first step is not lost.
        return min(1.0, (position + length) / (warmup + length))
    if schedule.name == "cosine":
        progress = (position - warmup) / max(epochs - warmup, 1)
        return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.name == "step":
        # Strictly above, as in the reference.
        return schedule.decay_rate ** sum(position > decay for decay in schedule.decay_epochs)
    return 1.0
