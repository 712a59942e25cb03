"""Stage three: the network learns from the images of which it is confident, and the state to keep is chosen."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..losses import self_label_loss
from ..models.heads import ClusterModel
from ..models.moving_average import MovingAverage
from ..neighbors import topk_neighbors
from ..ops.self_label import self_label_loss_distributed
from ..runs.artifacts import NEIGHBORS, SELFLABEL_MODEL
from ..runs.records import StageResult
from ..training.context import Context
from ..training.inference import forward_all
from ..training.loop import Stage, train
from .assessment import assess
from .confidence import CERTAIN, per_class
from .handover import CLUSTERING_LOGITS, FEATURES, SELFLABEL_LOGITS, Handover
from .inputs import cluster_model, mined_neighbors
from .keeping import KeptState
from .stability import Stability

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
        self.groups = context.groups_of(self.source)
        self.model = model
        self.average: MovingAverage[ClusterModel] | None = None
        if config.ema is not None:
            buffers = "keep" if config.ema_mode == "write_back" else "average"
            self.average = MovingAverage(model, config.ema, buffers=buffers)  # type: ignore[arg-type]
        self.kept: KeptState | None = None if config.keep == "last" else KeptState(config.keep == "guarded")
        self.stability = Stability(config.stop_when_stable)
        self._neighbors: Tensor | None = None
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

    def prepare(self) -> None:
        """Judge the start, the first candidate for the result."""
        if self.kept is not None and not self.kept.started:
            if not self.context.run.has(NEIGHBORS):
                self._neighbors = self._searched_neighbors()
            start = self._handover.get(CLUSTERING_LOGITS, self.context.reported, self._logits)
            self._judge(start, epoch=0)

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Render the weak view, which gives the label, and the strong view, which learns it."""
        weak, strong = self._views.render([(self._weak, 0), (self._strong, 1)], indices, epoch=epoch)
        return weak, strong

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy on confident images, zero if there is none; with several ranks, a share of it."""
        weak, strong = batch
        with torch.no_grad():
            weak_logits = self.result(weak)[0]
        threshold = self.config.threshold
        if self.config.confidence == "per_class":
            weak_logits, threshold = per_class(weak_logits, threshold, self.config.fraction), CERTAIN
        strong_logits, balance = self.model(strong)[0], self.config.balance
        if distributed.several():
            loss, confident = self_label_loss_distributed(
                weak_logits, strong_logits, threshold, balance=balance, impl="auto"
            )
        else:
            loss, confident = self_label_loss(weak_logits, strong_logits, threshold, balance=balance)
        return loss, {"loss": loss, "confident": confident / len(weak)}

    def after_step(self) -> None:
        """Move the average, and write it back if so configured."""
        if self.average is not None:
            self.average.update()
            if self.config.ema_mode == "write_back":
                self.average.write_back()

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Judge the state, and report metrics, every ``evaluate_every`` epochs and at the end."""
        if not last and epoch % self.config.evaluate_every:
            return {}
        reported = self.context.reported
        logits = self._logits()
        self.stability.note(logits[None], 0, epoch)
        scores = {} if self.kept is None else {"selection_score": self._judge(logits, epoch)}
        if self.kept is None and (last or self.finished()):
            self._handover.put(SELFLABEL_LOGITS, reported, logits)
        metrics = assess(self.context, logits, reported)
        keys = ("acc_many_to_one", "acc", "nmi", "clusters_used")
        return scores | {key: metrics[key] for key in keys if key in metrics}

    def finished(self) -> bool:
        """Return whether the assignments have stopped changing."""
        return self.stability.reached

    def state(self) -> dict[str, Any]:
        """Return the average's weights, the kept state, and what the end depends on."""
        return {
            "average": self.average.state_dict() if self.average is not None else None,
            "best": self.kept.state() if self.kept is not None else None,
            "neighbors": self._neighbors,
            "stability": self.stability.state(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.kept is not None:
            self.kept.load_state(state["best"])
        self._neighbors = state["neighbors"]
        self.stability.load_state(state["stability"])

    def _logits(self) -> Tensor:
        source = self.context.clustered[self.context.reported]
        return forward_all(self.context, self.result, self.result, source)[0].cpu()

    @cached_property
    def _judging_neighbors(self) -> Tensor:
        """The neighbours that states are judged by: those searched by this stage, otherwise the mined ones."""
        if self._neighbors is not None:
            return self._neighbors
        return mined_neighbors(self.context)[self.context.reported][:, : self.context.config.mining.test_k]

    def _judge(self, logits: Tensor, epoch: int) -> float:
        assert self.kept is not None
        score, kept = self.kept.judge(logits, self._judging_neighbors, self.result, epoch)
        if kept:
            self._handover.put(SELFLABEL_LOGITS, self.context.reported, logits)
        return score

    def _searched_neighbors(self) -> Tensor:
        """Return neighbours (N, k) int64 by the features of the start, for a run in which nothing was mined."""
        source = self.context.clustered[self.context.reported]
        k = min(self.context.config.mining.test_k, len(source) - 1)
        features = forward_all(self.context, self.result, self.result.features, source)
        return topk_neighbors(F.normalize(features.float(), dim=1), k)[1].cpu()


def run_selflabel(context: Context, handover: Handover) -> None:
    """Train on confident images, and keep the state that ``keep`` names."""
    handover.drop([FEATURES])  # they are of a frozen backbone, which learns now
    model, _ = cluster_model(context)
    stage = SelfLabel(context, model, handover)
    training = train(stage, context)
    results: dict[str, Any] = stage.stability.notes(stage.config.epochs)
    ended = stage.stability.words(NAME, stage.config.epochs)
    if ended is not None:
        context.tracker.say(ended)
    record = {}
    if stage.kept is not None:
        kept = dict(stage.kept.kept)
        stage.result.load_state_dict(kept.pop("model"))
        record = {"epoch": kept["epoch"], "selection_score": kept["score"]}
        results |= record
        of = "the model of the stage before" if kept["epoch"] == 0 else f"the state after epoch {kept['epoch']}"
        why = "the last that has not collapsed" if stage.config.keep == "guarded" else "of best score without labels"
        context.tracker.say(f"{NAME}: kept {of}, {why}")
    for split, source in context.clustered.items():

        def logits_of_all(source: Any = source) -> Tensor:
            return forward_all(context, stage.result, stage.result, source)[0].cpu()

        results[split] = assess(context, handover.get(SELFLABEL_LOGITS, split, logits_of_all), split)
    context.run.write(SELFLABEL_MODEL, StageResult(stage.result.state_dict(), record, context.run.images_digest))
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)
