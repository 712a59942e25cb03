"""Stage three: the network learns from the images that it is sure of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RunError
from ..losses import self_label_loss
from ..models.heads import ClusterModel
from ..models.weights import load_strict
from ..training.context import Context
from ..training.inference import forward_all
from ..training.loop import Stage, train
from .clustering import load_clustering
from .results import assess, final_logits

NAME = "selflabel"
FINAL = f"checkpoints/{NAME}-final.pt"


class SelfLabelling(Stage[tuple[Tensor, Tensor]]):
    """Self-labelling (https://arxiv.org/abs/2005.12320, section 2.3), optionally with a moving average of the weights.

    Without an average, or where it is written back, the labels come from the network itself in training mode, so that
    its batch statistics follow the plain images too, as in the original. A teacher gives the labels in evaluation mode.
    """

    name = NAME

    def __init__(self, context: Context, model: ClusterModel) -> None:
        config = context.config.selflabel
        assert config is not None
        self.context = context
        self.config = config
        self.training = config
        self.source = context.splits.train
        self.n_images = len(self.source)
        self.background = not self.source.resident
        self.model: ClusterModel = model
        self.average: ClusterModel | None = None
        if config.ema is not None:
            self.average = copy.deepcopy(model).requires_grad_(False).eval()
            self._pairs = _pairs(self.average, model, parameters_only=config.ema_mode == "write_back")
        self._views = context.views_of(self.source, NAME)
        self._weak, self._strong = context.view(config.weak_view), context.view(config.view)

    @property
    def result(self) -> ClusterModel:
        """The network that gives the labels and that the stage is about: the teacher where there is one."""
        return self.average if self.average is not None and self.config.ema_mode == "teacher" else self.model

    def networks(self) -> list[nn.Module]:
        """Return the backbones of the network and of its average."""
        return [model.backbone for model in (self.model, self.average) if model is not None]

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Render the weak view, which gives the label, and the strong view, which learns it."""
        weak, strong = self._views.render([(self._weak, 0), (self._strong, 1)], indices, epoch=epoch)
        return weak, strong

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the cross-entropy on confident images, zero where there is none."""
        weak, strong = batch
        with torch.no_grad():
            weak_logits = self.result(weak)[0]
        loss, confident = self_label_loss(
            weak_logits, self.model(strong)[0], self.config.threshold, balance=self.config.balance
        )
        return loss, {"loss": loss, "confident": confident / len(weak)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average; a teacher follows the batch statistics too, written-back ones stay those of the start."""
        if self.average is None or self.config.ema is None:
            return
        averages, weights, held, current = self._pairs
        torch._foreach_lerp_(averages, weights, 1 - self.config.ema)
        if self.config.ema_mode == "write_back":
            torch._foreach_copy_([*weights, *current], [*averages, *held])
        elif held:
            torch._foreach_copy_(held, current)

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Report the test metrics where they are due, and how many clusters are in use."""
        if not last and epoch % self.config.evaluate_every:
            return {}
        logits = forward_all(self.context, self.result, self.result, self.context.splits.test)[0].cpu()
        if last:
            self.context.logits[NAME] = {"test": logits}
        metrics = assess(self.context, logits, "test")
        return {key: metrics[key] for key in ("acc", "nmi", "clusters_used") if key in metrics}

    def state(self) -> dict[str, Any]:
        """Return the average's weights."""
        return {"average": self.average.state_dict() if self.average is not None else None}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the average's weights."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])


def _pairs(average: ClusterModel, model: ClusterModel, *, parameters_only: bool) -> tuple[list[Tensor], ...]:
    """Return the tensors that move (of the average, of the model), and the others (of the average, of the model)."""
    own, other = average.state_dict(), model.state_dict()
    moving = {name for name, _ in model.named_parameters()} if parameters_only else set(other)
    move = [name for name in own if name in moving and own[name].is_floating_point()]
    copy_ = [name for name in own if name not in move]
    return tuple([state[name] for name in names] for names in (move, copy_) for state in (own, other))


def run_self_labelling(context: Context) -> None:
    """Train on confident images and keep the last weights."""
    model, _ = load_clustering(context)
    stage = SelfLabelling(context, model)
    context.logits.pop(NAME, None)
    training = train(stage, context)
    logits = final_logits(context, stage.result, NAME)
    results = {split: assess(context, logits[split], split) for split in ("train", "test")}
    context.run.save(FINAL, {"model": stage.result.state_dict()})
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)


def load_self_labelling(context: Context) -> ClusterModel:
    """Return the finished model of stage three.

    Raises:
        RunError: where stage three has not been finished.
    """
    run = context.run
    if not run.has(FINAL):
        raise RunError(f"{run.path} has no finished self-labelling stage; run `scan-fast selflabel {run.path}` first")
    model = ClusterModel(context.without_pretrained, context.n_clusters)
    load_strict(model, run.load(FINAL)["model"], what=str(run.path / FINAL))
    return context.place(model)
