"""Stage one: a representation without labels, by a pretext method or from given weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loader import steps_per_epoch
from ..data.sources import Source
from ..methods import PretextMethod
from ..models.backbones import SmallResNet
from ..models.heads import PretextModel
from ..models.whitening import STEM_IMAGES, whiten_stem
from ..random import permutation, stream_key
from ..runs.artifacts import PRETEXT_MODEL, checkpoint
from ..runs.records import StageResult
from ..training.context import Context, seeded
from ..training.loop import Stage, Training, train
from ..views.parameters import PlainView
from .embedding import knn_check
from .handover import Handover

NAME = "pretext"


class Pretext(Stage[Sequence[Tensor]]):
    """Trains a pretext method on the images of the pretext split, or of the train split if there is none."""

    name = NAME
    model: PretextModel

    def __init__(self, context: Context, model: PretextModel, method: PretextMethod, handover: Handover) -> None:
        self.context = context
        self.config = context.config.pretext
        self.training = self.config
        self.source: Source = context.splits.pretext or context.splits.train
        self.n_images = len(self.source)
        self.background = not self.source.resident
        self.groups = context.groups_of(self.source)
        self.model = model
        self.method = method
        self.final: dict[str, float] = {}
        """Result of the last epoch's kNN check, which is also the stage's result."""
        self._handover = handover
        self._views = context.views_of(self.source, NAME)

    def modules(self) -> list[nn.Module]:
        """Return the model and the method's own modules."""
        return [self.model, *self.method.modules()]

    def batch(self, epoch: int, indices: Tensor) -> Sequence[Tensor]:
        """Render the method's views of each image, each (B, 3, S, S)."""
        views = self.method.views(epoch, self.config.epochs)
        return tuple(self._views.render([(view, number) for number, view in enumerate(views)], indices, epoch=epoch))

    def step(self, batch: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the method's loss."""
        return self.method.loss(batch)

    def after_step(self) -> None:
        """Let the method move its averages."""
        self.method.after_step()

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Report the kNN accuracy on the test images every ``monitor_every`` epochs and at the end, with labels."""
        every = self.config.monitor_every
        if not last and (every == 0 or epoch % every):
            return {}
        metrics = knn_check(self.context, self.model, self._handover if last else None)
        if last:
            self.final = metrics
        return metrics

    def state(self) -> dict[str, Any]:
        """Return the method's state and the last epoch's check."""
        return {"method": self.method.state(), "final": self.final}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the method's state and the last epoch's check."""
        self.method.load_state(state["method"])
        self.final = state["final"]


def run_pretext(context: Context, handover: Handover) -> None:
    """Train the pretext model, or take the weights that the configuration names."""
    settings = context.config.pretext.method
    with seeded(context.config.seed, NAME):
        model = start_model(context)
        method = build_method(context, model) if settings.trains else None
    if method is not None:
        stage = Pretext(context, model, method, handover)
        training = train(stage, context)
        results = stage.final
    else:
        settings.load(model)
        begin = time.perf_counter()
        results = knn_check(context, model, handover)
        training = Training(seconds=time.perf_counter() - begin)
    context.run.write(PRETEXT_MODEL, StageResult(model.state_dict(), images=context.run.images_digest))
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)


def build_method(context: Context, model: PretextModel) -> PretextMethod:
    """Return the method of the configuration, for its images and steps."""
    settings = context.config.pretext
    images = len(context.splits.pretext or context.splits.train)
    steps = settings.epochs * steps_per_epoch(images, settings.batch_size)
    method = settings.method.for_run(images, steps).build(model, context.side)
    for module in method.modules():
        context.place(module)
    return method


def start_model(context: Context) -> PretextModel:
    """Return the model that training starts from, drawn from the current random state."""
    model = context.place(PretextModel(context.model_config))
    if context.config.pretext.method.trains and not context.run.has(checkpoint(NAME)):
        start_stem(context, model)
    return model


def start_stem(context: Context, model: PretextModel) -> None:
    """Let the first convolution start from the images, if ``model.stem`` says so."""
    if context.model_config.stem != "whitened":
        return
    assert isinstance(model.backbone, SmallResNet)  # the configuration admits no other
    source = context.splits.pretext or context.splits.train
    key = stream_key(context.config.seed, f"{NAME}/stem")
    rows = permutation(key, 0, len(source))[:STEM_IMAGES].sort().values
    size = context.config.evaluation.batch_size
    views = context.views_of(source, NAME)
    side = context.config.pretext.method.side(context.side)
    plain = context.view(PlainView(kind="plain", size=side))
    images = torch.cat([views(plain, part, epoch=0, view_index=0) for part in rows.split(size)])
    whiten_stem(model.backbone.conv1, images, key)
