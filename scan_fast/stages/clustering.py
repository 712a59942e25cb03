"""Stage two: cluster heads trained on pairs of neighbours, and the choice among them without labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import distributed
from ..models.heads import ClusterModel
from ..objectives import Objective
from ..partitions.heads import fitted_heads
from ..random import integers, permutation, stream_key
from ..runs.artifacts import CLUSTER_MODEL, EMBEDDINGS, checkpoint
from ..runs.records import StageResult
from ..training.context import Context, seeded
from ..training.inference import forward_all
from ..training.loop import Stage, train
from ..views.inference import forward_views
from .assessment import assess
from .embedding import backbone_features, row_counts, rows_of
from .given import run_given_heads
from .handover import CLUSTERING_LOGITS, FEATURES, Handover
from .inputs import mined_neighbors, mined_rows, pretext_model
from .partitioning import run_partitioning
from .stability import Stability

NAME = "clustering"
NEIGHBOR_DRAW = 2
"""Number of the random stream that draws neighbours; 0 and 1 are the views of anchor and neighbour."""
CACHED_DRAWS = (3, 4)
"""Random streams that choose among cached views, for anchors and for neighbours."""
KMEANS_IMAGES = 20_000
"""Number of images, drawn at random, on which k-means runs for the start of the heads."""


class Partners:
    """The images that each image may be paired with.

    Args:
        neighbors: (N, k) int64 mined neighbours to draw from, k may be 0.
        include_self: an image may be paired with itself, that is, with another view of it.
        labels: (N,) int64 classes for the oracle, which keeps the neighbours of an image's own class alone. Labels
            affect training nowhere else. None: keep all neighbours.

    Attributes:
        index: (N, max(counts)) int64; the first ``counts[i]`` of row i are the partners of image i.
        counts: (N,) int64, at least 1: an image that would have no partner is its own.
        alone: number of images that have no neighbour left, to be paired with themselves.
    """

    def __init__(self, neighbors: Tensor, include_self: bool, labels: Tensor | None = None) -> None:
        own = torch.arange(len(neighbors))[:, None]
        self.alone = 0
        if labels is None:
            without_self = neighbors.shape[1] > 0 and not include_self
            self.index = neighbors if without_self else torch.cat([own, neighbors], dim=1)
            self.counts = torch.full((len(neighbors),), self.index.shape[1])
            return
        classes = labels.cpu()
        kept = (classes[neighbors] == classes[:, None]) & (neighbors != own)
        none = ~kept.any(dim=1, keepdim=True)
        self.alone = int(none.sum())
        kept = torch.cat([none | include_self, kept], dim=1)
        self.counts = kept.sum(dim=1)
        # The kept ones first, in their order.
        order = torch.argsort((~kept).to(torch.uint8), dim=1, stable=True)
        self.index = torch.cat([own, neighbors], dim=1).gather(1, order)[:, : int(self.counts.max())]


class Clustering(Stage[tuple[Tensor, Tensor]]):
    """Trains any number of heads with the configured objective (SCAN: arXiv 2005.12320, section 2.2)."""

    name = NAME
    model: ClusterModel

    def __init__(self, context: Context, model: ClusterModel, handover: Handover) -> None:
        self.context = context
        self.config = context.config.clustering
        self.training = self.config
        self.source = context.splits.train
        self.n_images = len(self.source)
        self.background = not self.source.resident
        self.groups = context.groups_of(self.source)
        self.model = model
        self.objective: Objective = self.config.objective.build()
        self.frozen = self.config.update == "heads"
        neighbors = mined_neighbors(context)
        labels = self.source.labels if self.config.true_neighbors else None
        self.partners = Partners(neighbors["train"][:, : self.config.neighbors], self.config.include_self, labels)
        self._selection_neighbors = neighbors[context.reported][:, : context.config.mining.test_k]
        self.stability = Stability(self.config.stop_when_stable)
        self._handover = handover
        self._views = context.views_of(self.source, NAME)
        self._view = context.view(self.config.view)
        self._best: dict[str, Any] | None = None
        self._cached: Tensor | None = None
        self._started = False
        if self.frozen:
            model.backbone.requires_grad_(False)
        self.objective.attach(model)

    def prepare(self) -> None:
        """Let the objective look at the initial predictions, and precompute features if ``cached_views`` is set."""
        if not self._started:
            self.objective.start(lambda: logits_of(self.context, self.model, "train", self._handover))
            self._started = True
        if self.config.cached_views is not None:
            size = self.context.config.evaluation.batch_size
            views = self.config.cached_views
            with self.context.tracker.counted(f"{NAME}: views cached", views * self.n_images) as done:
                cached = [
                    forward_views(
                        self.model,
                        self.model.features,
                        self._views,
                        self._view,
                        size,
                        self.context.autocast(),
                        epoch=view,
                        done=done,
                    )
                    for view in range(views)
                ]
            self._cached = torch.stack(cached)

    def train_mode(self) -> None:
        """Keep a frozen backbone in evaluation mode, as the reference does."""
        self.model.train(not self.frozen)

    def networks(self) -> list[nn.Module]:
        """Return the backbone, unless it only ran in advance."""
        return [] if self._cached is not None else [self.model.backbone]

    def modules(self) -> list[nn.Module]:
        """Return the model and the objective's own modules."""
        return [self.model, *self.objective.modules()]

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return each anchor and one of its neighbours, drawn per epoch: rendered, or features of cached views."""
        draw = integers(self._views.key, epoch, indices, NEIGHBOR_DRAW, self.partners.counts[indices])
        chosen = self.partners.index[indices, draw]
        if self._cached is not None:
            views = (integers(self._views.key, epoch, indices, d, len(self._cached)) for d in CACHED_DRAWS)
            anchors, neighbors = (self._cached[v, rows] for v, rows in zip(views, (indices, chosen), strict=True))
            return anchors, neighbors
        anchors = self._views(self._view, indices, epoch=epoch, view_index=0)
        neighbors = self._views(self._view, chosen, epoch=epoch, view_index=1, samples=indices)
        return anchors, neighbors

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the heads' losses. Anchors and neighbours pass the backbone separately."""
        if self._cached is not None:
            anchors, neighbors = batch
        else:
            with torch.set_grad_enabled(not self.frozen):
                anchors, neighbors = (self.model.features(images) for images in batch)
        losses, metrics = self.objective.loss(self.model.heads, anchors, neighbors)
        return losses.sum(), metrics

    def after_step(self) -> None:
        """Let the objective move its averages."""
        self.objective.after_step()

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Keep the epoch and the head of best (lowest) score on the reported split; labels play no part."""
        if not last and epoch % self.config.evaluate_every:
            return {}
        reported = self.context.reported
        logits = logits_of(self.context, self.model, reported, self._handover)
        scores = self.objective.score(logits, self._selection_neighbors)
        head = int(scores.argmin())
        score = float(scores[head])
        self.stability.note(logits, head, epoch)
        if self._best is None or score < self._best["loss"]:
            state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = {"model": state, "head": head, "loss": score, "epoch": epoch}
        metrics = {"selection_loss": score, "head": float(head)}
        assessed = assess(self.context, logits[head].cpu(), reported)
        return metrics | {key: assessed[key] for key in ("acc_many_to_one", "acc", "nmi") if key in assessed}

    def finished(self) -> bool:
        """Return whether the assignments have stopped changing."""
        return self.stability.reached

    @property
    def best(self) -> dict[str, Any]:
        """Return the kept weights ("model"), the head, its score ("loss") and the epoch."""
        assert self._best is not None  # the last epoch is always evaluated
        return self._best

    def state(self) -> dict[str, Any]:
        """Return the best so far, the objective's state, and what the end depends on."""
        return {"best": self._best, "objective": self.objective.state(), "stability": self.stability.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self._started = True
        self._best = state["best"]
        self.stability.load_state(state["stability"])
        self.objective.load_state(state["objective"])


def run_clustering(context: Context, handover: Handover) -> None:
    """Train the heads (and the backbone, unless it is frozen) and keep the best head by its score."""
    config = context.config.clustering
    if config.weights is not None:
        run_given_heads(context, NAME, config.weights, config.weights_head, handover)
        return
    if not config.trains:
        run_partitioning(context, NAME, handover)
        return
    stage = build(context, handover)
    model = stage.model
    if config.true_neighbors:
        alone = f"{stage.partners.alone:,} of {stage.n_images:,} images have none"
        context.tracker.say(f"{NAME}: oracle: labels choose the neighbours that train; {alone}")
    training = train(stage, context)
    ended = stage.stability.words(NAME, config.epochs)
    if ended is not None:
        context.tracker.say(ended)
    best = stage.best
    model.load_state_dict(best["model"])
    results: dict[str, Any] = {"head": best["head"], "epoch": best["epoch"], "selection_loss": best["loss"]}
    results |= stage.stability.notes(config.epochs)
    if config.true_neighbors:
        results["label_oracle"] = {"true_neighbors": True, "images_without": stage.partners.alone}
    single = model.head(best["head"])
    for split in context.clustered:
        logits = logits_of(context, single, split, handover)[0].cpu()
        handover.put(CLUSTERING_LOGITS, split, logits)
        results[split] = assess(context, logits, split)
    record = {name: value for name, value in best.items() if name != "model"}
    context.run.write(CLUSTER_MODEL, StageResult(best["model"], record, context.run.images_digest))
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)


def build(context: Context, handover: Handover) -> Clustering:
    """Return the stage with the heads that it starts from."""
    config = context.config.clustering
    with seeded(context.config.seed, NAME):
        model = context.place(ClusterModel(context.without_pretrained, context.n_clusters, config.heads))
    model.backbone.load_state_dict(pretext_model(context).backbone.state_dict())
    if config.initialize == "kmeans" and not context.run.has(checkpoint(NAME)):
        start_from_kmeans(context, model, handover)
    if config.update == "full":
        handover.drop([FEATURES])  # only a frozen backbone needs them again
    return Clustering(context, model, handover)


@torch.no_grad()
def logits_of(context: Context, model: ClusterModel, split: str, handover: Handover) -> Tensor:
    """Return the logits (H, N, C) of a split; a frozen backbone computes its features once."""
    if context.config.clustering.update == "full":
        return forward_all(context, model, model, context.clustered[split])
    # In the batches of a whole forward pass, so that another process finds the same bits.
    rows = backbone_features(context, model, split, handover).split(context.config.evaluation.batch_size)
    with context.autocast():
        own = torch.cat([model.heads(features).float() for features in rows], dim=-2)
    return distributed.all_rows(own, row_counts(context, split), dim=-2)


@torch.no_grad()
def start_from_kmeans(context: Context, model: ClusterModel, handover: Handover) -> None:
    """Fit each linear head to a k-means solution, each with its own seed, of the embeddings that were mined.

    Neighbours are searched there because they are purer there, and so are the clusters. Without embeddings, as with
    given neighbours, k-means runs on the unit features.
    """
    order = permutation(stream_key(context.config.seed, f"{NAME}/kmeans"), 0, len(context.splits.train))
    rows = order[:KMEANS_IMAGES].sort().values
    features = _some_features(context, model, rows, handover)
    context.tracker.say(f"{NAME}: k-means of {len(rows):,} images for the start of {model.n_heads} heads")
    weights, biases = distributed.on_first(lambda: _fitted_to_kmeans(context, model, rows, features))
    for head, weight, bias in zip(model.cluster_head, weights, biases, strict=True):
        assert isinstance(head, nn.Linear)
        head.weight.copy_(weight)
        head.bias.copy_(bias)


def _some_features(context: Context, model: ClusterModel, rows: Tensor, handover: Handover) -> Tensor:
    """Return the features of some training images, (n, D) float32 on the device, on every rank."""
    features = backbone_features(context, model, "train", handover).float()
    begin = rows_of(context, "train").start
    own = rows[(rows >= begin) & (rows < begin + len(features))] - begin
    return distributed.all_rows(features[own.to(features.device)], distributed.gathered(len(own)))


def _fitted_to_kmeans(context: Context, model: ClusterModel, rows: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights and biases, on the CPU, of the heads that start from k-means of some training images."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    if context.run.has(EMBEDDINGS):
        unit = mined_rows(context)["train"][rows.numpy()].astype(np.float64)
    else:
        unit = F.normalize(features, dim=1).cpu().numpy().astype(np.float64)
    starts = []
    for number in range(model.n_heads):
        # One thread: several add up the centres in the order in which they finish, and no two runs agree in all bits.
        with threadpool_limits(1):
            seed = (context.config.seed * 1000 + number) % 2**32  # scikit-learn takes 32 bits
            kmeans = KMeans(model.n_clusters, n_init=3, random_state=seed).fit(unit)
        starts.append(torch.from_numpy(kmeans.labels_).long())
    weights, biases = fitted_heads(features, torch.stack(starts).to(features.device), model.n_clusters)
    return weights.cpu(), biases.cpu()
