"""Stage one: a representation without labels, by SimCLR or from given weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..data.sources import Source
from ..errors import ConfigError, RunError
from ..evaluation.probes import knn_accuracy
from ..losses import nt_xent
from ..models.heads import ClusterModel, PretextModel
from ..models.reference_checkpoints import read_original
from ..models.weights import load_strict
from ..training.context import Context, seeded
from ..training.inference import forward_all, splits_of
from ..training.loop import Stage, Training, train
from ..views.parameters import View

NAME = "pretext"
FINAL = f"checkpoints/{NAME}-final.pt"


class Pretext(Stage[tuple[Tensor, Tensor]]):
    """SimCLR (https://arxiv.org/abs/2002.05709): two views of an image attract, all others repel."""

    name = NAME

    model: PretextModel

    def __init__(self, context: Context, model: PretextModel) -> None:
        self.context = context
        self.config = context.config.pretext
        self.training = self.config
        self.source: Source = context.splits.pretext or context.splits.train
        self.n_images = len(self.source)
        self.background = not self.source.resident
        self.model = model
        self._views = context.views_of(self.source, NAME)
        self._view = context.view(self.config.view)
        self.final: dict[str, float] = {}
        """What the last epoch's check found; it is kept, so that it is made once."""

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Render two views of each image, each (B, 3, S, S)."""
        view = self.view_of(epoch)
        first, second = self._views.render([(view, 0), (view, 1)], indices, epoch=epoch)
        return first, second

    def view_of(self, epoch: int) -> View:
        """Return the view of an epoch (from 0): smaller in the first ones, where the configuration says so."""
        for share, size in self.config.resolutions:
            if epoch < round(share * self.config.epochs):
                return self._view.model_copy(update={"size": size})
        return self._view

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the NT-Xent loss; both views go through the network, and its batch statistics, together."""
        embeddings = self.model(torch.cat(batch))
        z0, z1 = embeddings.chunk(2)
        loss = nt_xent(z0, z1, self.config.temperature, anchors=self.config.anchors)
        return loss, {"loss": loss}

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Report the kNN accuracy on the test images where it is due and there are labels."""
        every = self.config.monitor_every
        if not last and (every == 0 or epoch % every):
            return {}
        metrics = knn_monitor(self.context, self.model, final=last)
        if last:
            self.final = metrics
        return metrics

    def state(self) -> dict[str, Any]:
        """Return the last epoch's check."""
        return {"final": self.final}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the last epoch's check."""
        self.final = state["final"]


def knn_monitor(context: Context, model: PretextModel, *, final: bool = False) -> dict[str, float]:
    """Return {"knn_acc": accuracy} of a weighted kNN vote of the train images on the test images, {} without labels.

    The embeddings of a model that is ``final`` are handed on to mining, which needs the same.
    """
    train_split, test_split = context.splits.train, context.splits.test
    if train_split.labels is None or test_split.labels is None:
        return {}
    bank, queries = (embed(context, model, split, final=final) for split in ("train", "test"))
    config = context.config.pretext
    accuracy = knn_accuracy(
        bank, train_split.labels, queries, test_split.labels, k=config.monitor_k, temperature=config.temperature
    )
    return {"knn_acc": accuracy}


def embed(context: Context, model: PretextModel, split: str, *, final: bool) -> Tensor:
    """Return (N, D) float32: a split in the space where neighbours are searched, not normalised, on the run's device.

    Where the model is ``final``, the network does it once in a process.
    """
    projection = context.config.mining.features == "projection"
    kept = context.embeddings if projection else context.features
    if final and split in kept:
        return kept[split]
    found = forward_all(context, model, model if projection else model.features, splits_of(context)[split])
    if final:
        kept[split] = found
    return found


def backbone_features(context: Context, model: PretextModel | ClusterModel, split: str) -> Tensor:
    """Return the (N, D) float32 features of a split by the finished pretext model's backbone, made once in a process.

    Args:
        context: the run.
        model: has that very backbone.
        split: "train" or "test".
    """
    if split not in context.features:
        context.features[split] = forward_all(context, model, model.features, splits_of(context)[split])
    return context.features[split]


def run_pretext(context: Context) -> None:
    """Train the pretext model, or take the weights that the configuration names."""
    config = context.config.pretext
    context.embeddings, context.features = {}, {}  # of a former model
    with seeded(context.config.seed, NAME):
        model = context.place(PretextModel(context.model_config))
    training = Training(seconds=0.0)
    if config.method == "simclr":
        stage = Pretext(context, model)
        training = train(stage, context)
        results = stage.final
    else:
        if config.method == "weights":
            load_given_weights(context, model)
        elif not context.config.model.pretrained:
            raise ConfigError("pretext.method=none takes the backbone as it is, so it needs model.pretrained=true")
        elif context.config.mining.features == "projection":
            raise ConfigError("pretext.method=none has no trained projector, so it needs mining.features=backbone")
        results = knn_monitor(context, model, final=True)
    context.run.save(FINAL, {"model": model.state_dict()})
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)


def load_given_weights(context: Context, model: PretextModel) -> None:
    """Load ``pretext.weights``: a file of this project, of the original project, or of official MoCo-v2."""
    path = context.config.pretext.weights
    if path is None:
        raise ConfigError("pretext.method=weights needs pretext.weights=FILE")
    original = read_original(path.expanduser())
    if original.kind not in ("pretext", "moco"):
        raise ConfigError(f"pretext.weights={path} holds a {original.kind} model; stage one needs a pretext model")
    load_strict(model, original.state_dict, what=str(path))


def load_pretext(context: Context) -> PretextModel:
    """Return the finished pretext model.

    Raises:
        RunError: where stage one has not been finished.
    """
    if not context.run.has(FINAL):
        raise RunError(
            f"{context.run.path} has no finished pretext stage; run `scan-fast pretext {context.run.path}` first"
        )
    model = PretextModel(context.without_pretrained)
    load_strict(model, context.run.load(FINAL)["model"], what=str(context.run.path / FINAL))
    return context.place(model)
