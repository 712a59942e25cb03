"""Pairs of stages, ours and the baseline's, with the same images, settings and weights: for benchmarks and tests."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from scan_fast.data.datasets import STATISTICS, Splits, open_splits, source_from
from scan_fast.data.loader import epoch_batches, steps_per_epoch
from scan_fast.data.sources import Source, SubsetSource
from scan_fast.methods import SimCLRSettings
from scan_fast.models.heads import ClusterModel, PretextModel
from scan_fast.objectives import SCANSettings
from scan_fast.random import permutation, stream_key
from scan_fast.runs.config import Config
from scan_fast.stages import clustering, pretext, selflabel
from scan_fast.stages.handover import Handover
from scan_fast.stages.inputs import mined_neighbors
from scan_fast.training.context import Context, seeded
from scan_fast.training.loop import Stage
from scan_fast.training.optimizers import build_optimizer, write_learning_rate

from . import baseline, baseline_images
from .views import pictures

HELD_OUT = 200


@dataclass
class Images:
    """Training data of both sides: our sources, and the functions with which the baseline opens their images."""

    splits: Splits
    train: baseline_images.Opener
    test: baseline_images.Opener
    what: str


def open_images(config: Config, folder: Path | None, limit: int | None) -> Images:
    """Open a folder of images, or the data set of the configuration if there is none.

    All images of a folder are trained on; the first of them are also the held-out ones, which no figure depends on.
    """
    if folder is None:
        splits = open_splits(config.data.model_copy(update={"limit": limit}))
        assert splits.test is not None  # the data sets have test images
        return Images(splits, _opener(splits.train), _opener(splits.test), config.data.source)
    source = source_from(folder, config.data)
    if limit is not None and limit < len(source):
        rows = permutation(stream_key(0, "limit"), 0, len(source))[:limit].sort().values
        source = SubsetSource(source, rows)
    files, size = [folder / path for path in source.paths], source.size
    test = SubsetSource(source, torch.arange(min(HELD_OUT, len(source))))
    mean, std = STATISTICS.get(config.data.source, STATISTICS["imagenet"])

    def open_file(i: int) -> Image.Image:
        image = Image.open(files[i]).convert("RGB")
        return image if image.size == (size, size) else baseline_images.square(image, size)

    splits = Splits(source, test, None, config.data.mean or mean, config.data.std or std)
    return Images(splits, open_file, open_file, f"{len(source)} image files of {size} x {size}")


def _opener(source: Source) -> baseline_images.Opener:
    images = source.read(torch.arange(len(source))).numpy()
    return lambda i: Image.fromarray(images[i])


def write_images(folder: Path, n: int, side: int = 32) -> Path:
    """Write ``n`` smooth random JPEG files in ten class folders, for want of real ones."""
    for i, image in enumerate(pictures(n, side)):
        file = folder / f"{i % 10}" / f"{i:05d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.numpy()).save(file, quality=95)
    return folder


# ---- the pairs ---------------------------------------------------------------------------------------------------


@dataclass
class Pair:
    """One stage of both sides."""

    ours: Stage[Any]
    baseline: baseline.Stage


def default_workers() -> int:
    """Return the number of loader processes of the baseline: one per core, at most 16."""
    return min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def make_pair(
    name: str, context: Context, images: Images, model: nn.Module | None = None, workers: int | None = None
) -> Pair:
    """Build a stage for both, with the same weights.

    Args:
        name: "pretext", "clustering" (after mining) or "selflabel".
        context: of our side.
        images: those of the context.
        model: the network of the previous stage: None for the pretext stage.
        workers: the baseline's loader processes.
    """
    config, splits = context.config, images.splits
    workers = default_workers() if workers is None else workers
    network, n = context.model_config, len(splits.train)

    def pairs(first: Any, second: Any, neighbors: Tensor | None = None) -> baseline_images.Pairs:
        views = [baseline_images.transform(context.view(view), splits.mean, splits.std) for view in (first, second)]
        return baseline_images.Pairs(n, images.train, views[0], views[1], neighbors)

    if name == "pretext":
        method = config.pretext.method
        if not isinstance(method, SimCLRSettings):
            raise ValueError(f"the baseline trains SimCLR only, got pretext.method={method.kind}")
        if method.resolutions:
            raise ValueError("the baseline's views have one size; pretext.method.resolutions must be empty")
        with seeded(config.seed, name):
            fresh = context.place(PretextModel(network))
        data = pairs(method.view, method.view)
        plain = _same_weights(baseline.ContrastiveModel(network), fresh)
        theirs: baseline.Stage = baseline.SimCLR(plain, config.pretext, data, context.device, workers)
        return Pair(pretext.Pretext(context, fresh, method.build(fresh, splits.train.size), Handover()), theirs)
    if name == "clustering":
        settings = config.clustering
        if not isinstance(settings.objective, SCANSettings):
            raise ValueError(f"the baseline trains SCAN only, got clustering.objective={settings.objective.kind}")
        with seeded(config.seed, name):
            heads = context.place(ClusterModel(network, context.n_clusters, settings.heads))
        assert isinstance(model, PretextModel)
        heads.backbone.load_state_dict(model.backbone.state_dict())
        neighbors = mined_neighbors(context)["train"][:, : settings.neighbors]
        if settings.include_self:
            neighbors = torch.cat([torch.arange(n)[:, None], neighbors], dim=1)
        ours = clustering.Clustering(context, heads, Handover())
        plain_heads = baseline.ClusteringModel(network, context.n_clusters, settings.heads)
        _same_weights(plain_heads, heads)
        if settings.update == "heads":
            plain_heads.backbone.requires_grad_(False)
        data = pairs(settings.view, settings.view, neighbors)
        return Pair(ours, baseline.SCAN(plain_heads, settings, data, context.device, workers))
    stage = config.selflabel
    assert stage is not None
    assert isinstance(model, ClusterModel)
    single = context.place(ClusterModel(network, context.n_clusters))
    single.load_state_dict(model.head(0).state_dict())
    plain_single = _same_weights(baseline.ClusteringModel(network, context.n_clusters, 1), single)
    theirs = baseline.SelfLabel(plain_single, stage, pairs(stage.weak_view, stage.view), context.device, workers)
    return Pair(selflabel.SelfLabel(context, single, Handover()), theirs)


def _same_weights(plain: nn.Module, ours: nn.Module) -> Any:
    plain.load_state_dict({name: value.detach().contiguous() for name, value in ours.state_dict().items()})
    return plain


# ---- what is measured of a pair ----------------------------------------------------------------------------------


def compare_losses(
    make: Callable[[Context], Pair], context: Context, steps: int, batch_size: int, dtype: torch.dtype = torch.float32
) -> list[tuple[float, float]]:
    """Train both for some steps without autocast on the same rendered views; return (ours, baseline) of each step.

    Args:
        make: builds the pair, with networks of ``dtype``.
        context: of our side.
        steps: the largest number of steps; they are the first of the first epoch.
        batch_size: images per step. The learning rate is scaled with it.
        dtype: of networks and views. In float64 both must agree to rounding. In float32 an untrained network, whose
            embeddings all point the same way, turns the last bit of a loss into the third digit of a gradient, so only
            the first step agrees to rounding.
    """
    pair = make(dataclasses.replace(context, config=context.config.model_copy(update={"precision": "float32"})))
    ours, theirs = pair.ours, pair.baseline
    optimizer = build_optimizer(ours.parameters(), ours.training.optimizer)
    ours.train_mode()
    theirs.train_mode()
    rate = ours.training.optimizer.lr * min(1.0, batch_size / ours.training.batch_size)
    write_learning_rate(optimizer, rate)
    write_learning_rate(theirs.optimizer, rate)
    losses = []
    orders = epoch_batches(stream_key(context.config.seed, ours.name), 0, ours.n_images, batch_size)
    for _, indices in zip(range(steps), orders, strict=False):
        batch = tuple(view.to(dtype) for view in ours.batch(0, indices))
        value = theirs.step([view.contiguous() for view in batch])
        loss, _ = ours.step(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ours.after_step()
        losses.append((float(loss.detach()), value))
    return losses


def largest_difference(losses: Sequence[tuple[float, float]]) -> float:
    """Return the largest difference of two losses, relative to the larger of 1 and the baseline's."""
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in losses)


def training_flops(stage: baseline.Stage, side: int) -> float:
    """Return the flops of the network's convolutions and matrix products per image of a training step."""
    images = 2
    views = [torch.randn(images, 3, side, side, device=stage.device) for _ in range(2)]
    stage.train_mode()
    with FlopCounterMode(display=False) as counter:
        torch.stack(_tensors(stage.forward(views))).sum().backward()
    stage.optimizer.zero_grad()
    return counter.get_total_flops() / images


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs.sum()] if outputs.requires_grad else []
    return [tensor for output in outputs for tensor in _tensors(output)]


class Parts:
    """Adds up the seconds of the parts of a step, waiting for each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        self.last = 0.0
        self.start()

    def start(self) -> None:
        self.last = self._now()

    def mark(self, part: str) -> None:
        """Add the time since the last mark to a part."""
        now = self._now()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def our_parts(stage: Stage[Any], context: Context, steps: int) -> dict[str, float]:
    """Make some steps part by part; return the mean seconds of views, forward, loss, backward and optimiser."""
    optimizer = build_optimizer(stage.parameters(), stage.training.optimizer)
    size = stage.training.batch_size
    steps = min(steps, steps_per_epoch(stage.n_images, size))
    stage.train_mode()
    model = stage.model
    layers = [module for module in model.children() if not isinstance(module, nn.ModuleList)]
    layers += [head for module in model.children() if isinstance(module, nn.ModuleList) for head in module]
    orders = epoch_batches(stream_key(context.config.seed, stage.name), 0, stage.n_images, size)
    parts = Parts(context.device)
    # The loss is the part of a step after the last module of the network.
    hooks = [layer.register_forward_hook(lambda *_: parts.mark("forward")) for layer in layers]
    for _, indices in zip(range(steps), orders, strict=False):
        parts.start()
        batch = stage.batch(0, indices)
        parts.mark("views")
        with context.autocast():
            loss, _ = stage.step(batch)
        parts.mark("loss")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parts.mark("backward")
        optimizer.step()
        stage.after_step()
        parts.mark("optimiser")
    for hook in hooks:
        hook.remove()
    return {name: seconds / steps for name, seconds in parts.seconds.items()}


def baseline_parts(stage: baseline.Stage, steps: int) -> dict[str, float]:
    """Make some steps; return the mean seconds of waiting (for the loader), forward, loss, backward, optimiser."""
    steps = min(steps, len(stage.loader))
    stage.train_mode()
    batches = iter(stage.loader)
    parts = Parts(stage.device)
    for _ in range(steps):
        parts.start()
        views = [view.to(stage.device, non_blocking=True) for view in next(batches)]
        parts.mark("waiting")
        outputs = stage.forward(views)
        parts.mark("forward")
        loss = stage.loss(outputs)
        loss.item()
        parts.mark("loss")
        stage.optimizer.zero_grad()
        loss.backward()
        parts.mark("backward")
        stage.optimizer.step()
        stage.after_step()
        parts.mark("optimiser")
    return {name: seconds / steps for name, seconds in parts.seconds.items()}
