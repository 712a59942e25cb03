"""Stage three: the network learns from the images of which it is confident."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..losses import self_label_loss
from ..models.heads import ClusterModel
from ..models.moving_average import MovingAverage
from ..runs.artifacts import SELFLABEL_MODEL
from ..runs.records import StageResult
from ..training.context import Context
from ..training.inference import forward_all
from ..training.loop import Stage, train
from .assessment import assess
from .handover import FEATURES, SELFLABEL_LOGITS, Handover
from .inputs import cluster_model

NAME = "selflabel"


class SelfLabel(Stage[tuple[Tensor, Tensor]]):
    """Self-labelling (https://arxiv.org/abs/2005.12320, section 2.3), optionally with a moving average of the weights.

    Without an average, or if it is written back, the network itself gives the labels in training mode, so that its
    batch statistics follow the weak views too, as in the reference. A teacher gives the labels in evaluation mode.
    """

    name = NAME
    model: ClusterModel

    def __init__(self, context: Context, model: ClusterModel, handover: Handover) -> None:
        config = context.config.selflabel
        assert config is not None
        self.context = context
        self.config = config
        self.training = config
        self.source = context.splits.train
        self.n_images = len(self.source)
        self.background = not self.source.resident
        self.model = model
        self.average: MovingAverage[ClusterModel] | None = None
        if config.ema is not None:
            buffers = "keep" if config.ema_mode == "write_back" else "average"
            self.average = MovingAverage(model, config.ema, buffers=buffers)  # type: ignore[arg-type]
        self._handover = handover
        self._views = context.views_of(self.source, NAME)
        self._weak, self._strong = context.view(config.weak_view), context.view(config.view)

    @property
    def result(self) -> ClusterModel:
        """Return the network that gives the labels and becomes the stage's result: the teacher if there is one."""
        return self.average.model if self.average is not None and self.config.ema_mode == "teacher" else self.model

    def networks(self) -> list[nn.Module]:
        """Return the backbones of the network and of its average."""
        return [self.model.backbone, *([self.average.model.backbone] if self.average is not None else [])]

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Render the weak view, which gives the label, and the strong view, which learns it."""
        weak, strong = self._views.render([(self._weak, 0), (self._strong, 1)], indices, epoch=epoch)
        return weak, strong

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy on confident images, zero if there is none."""
        weak, strong = batch
        with torch.no_grad():
            weak_logits = self.result(weak)[0]
        loss, confident = self_label_loss(
            weak_logits, self.model(strong)[0], self.config.threshold, balance=self.config.balance
        )
        return loss, {"loss": loss, "confident": confident / len(weak)}

    def after_step(self) -> None:
        """Move the average, and write it back if so configured."""
        if self.average is not None:
            self.average.update()
            if self.config.ema_mode == "write_back":
                self.average.write_back()

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Report metrics and the number of clusters in use, every ``evaluate_every`` epochs and at the end."""
        if not last and epoch % self.config.evaluate_every:
            return {}
        reported = self.context.reported
        logits = forward_all(self.context, self.result, self.result, self.context.clustered[reported])[0].cpu()
        if last:
            self._handover.put(SELFLABEL_LOGITS, reported, logits)
        metrics = assess(self.context, logits, reported)
        keys = ("acc_many_to_one", "acc", "nmi", "clusters_used")
        return {key: metrics[key] for key in keys if key in metrics}

    def state(self) -> dict[str, Any]:
        """Return the average's weights."""
        return {"average": self.average.state_dict() if self.average is not None else None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the average's weights."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def run_selflabel(context: Context, handover: Handover) -> None:
    """Train on confident images and keep the last weights."""
    handover.drop([FEATURES])  # they are of a frozen backbone, which learns now
    model, _ = cluster_model(context)
    stage = SelfLabel(context, model, handover)
    training = train(stage, context)
    results = {}
    for split, source in context.clustered.items():

        def logits_of_all(source: Any = source) -> Tensor:
            return forward_all(context, stage.result, stage.result, source)[0].cpu()

        results[split] = assess(context, handover.get(SELFLABEL_LOGITS, split, logits_of_all), split)
    context.run.write(SELFLABEL_MODEL, StageResult(stage.result.state_dict()))
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)
