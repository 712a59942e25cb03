"""Stage two: a clustering head under the SCAN loss, where neighbours agree and clusters spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RunError
from ..evaluation.model_selection import selection_loss
from ..losses import scan_loss
from ..models.heads import ClusterModel
from ..models.weights import load_strict
from ..random import integers, permutation, stream_key
from ..training.context import Context, seeded
from ..training.inference import forward_all, splits_of
from ..training.loop import Stage, train
from ..views.inference import forward_views
from .mining import load_neighbors
from .pretext import backbone_features, load_pretext
from .results import assess

NAME = "clustering"
FINAL = f"checkpoints/{NAME}-final.pt"
NEIGHBOR_DRAW = 2
"""The number of the random stream that draws neighbours; 0 and 1 are the views of anchor and neighbour."""
CACHED_DRAWS = (3, 4)
"""The random streams that choose among cached views: for anchors and for neighbours."""
KMEANS_IMAGES = 20_000
"""So many images, drawn at random, are enough for a k-means start."""


class Clustering(Stage[tuple[Tensor, Tensor]]):
    """SCAN (https://arxiv.org/abs/2005.12320, section 2.2) with any number of heads."""

    name = NAME
    model: ClusterModel

    def __init__(self, context: Context, model: ClusterModel) -> None:
        self.context = context
        self.config = context.config.clustering
        self.training = self.config
        self.source = context.splits.train
        self.n_images = len(self.source)
        self.background = not self.source.resident
        self.model = model
        neighbors = load_neighbors(context)
        self._neighbors = neighbors["train"][:, : self.config.neighbors]
        if self.config.include_self:
            self._neighbors = torch.cat([torch.arange(self.n_images)[:, None], self._neighbors], dim=1)
        self._test_neighbors = neighbors["test"]
        self._views = context.views_of(self.source, NAME)
        self._view = context.view(self.config.view)
        self._best: dict[str, Any] | None = None
        self._cached: Tensor | None = None
        self.frozen = self.config.update == "heads"
        if self.frozen:
            model.backbone.requires_grad_(False)

    def prepare(self) -> None:
        """Make the features on which heads of a frozen backbone train, (views, N, D), where they are to be cached."""
        if self.config.cached_views is not None:
            size = self.context.config.evaluation.batch_size
            cached = [
                forward_views(
                    self.model, self.model.features, self._views, self._view, size, self.context.autocast(), epoch=view
                )
                for view in range(self.config.cached_views)
            ]
            self._cached = torch.stack(cached)

    def train_mode(self) -> None:
        """Heads alone are trained on the features of a backbone in evaluation mode, as in the original."""
        self.model.train(not self.frozen)

    def networks(self) -> list[nn.Module]:
        """Return the backbone; heads alone have nothing to compile."""
        return [] if self._cached is not None else [self.model.backbone]

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return each anchor and one neighbour of it, drawn anew every epoch: rendered, or features of cached views."""
        choices = self._neighbors.shape[1]
        draw = integers(self._views.key, epoch, indices, NEIGHBOR_DRAW, choices)
        chosen = self._neighbors[indices, draw]
        if self._cached is not None:
            views = (integers(self._views.key, epoch, indices, d, len(self._cached)) for d in CACHED_DRAWS)
            anchors, neighbors = (self._cached[v, rows] for v, rows in zip(views, (indices, chosen), strict=True))
            return anchors, neighbors
        anchors = self._views(self._view, indices, epoch=epoch, view_index=0)
        neighbors = self._views(self._view, chosen, epoch=epoch, view_index=1, samples=indices)
        return anchors, neighbors

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the heads' losses; anchors and neighbours have batch statistics of their own."""
        if self.frozen:
            with torch.no_grad():
                features = batch if self._cached is not None else [self.model.features(images) for images in batch]
            anchors, neighbors = (self.model.heads(f) for f in features)
        else:
            anchors, neighbors = (self.model(images) for images in batch)
        total, consistency, entropy = scan_loss(anchors, neighbors, self.config.entropy_weight)
        return total.sum(), {"loss": total.mean(), "consistency": consistency.mean(), "entropy": entropy.mean()}

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Pick the head, and keep the epoch, of lowest SCAN loss on the held-out images; labels have no part in it."""
        if not last and epoch % self.config.evaluate_every:
            return {}
        logits = logits_of(self.context, self.model, "test")
        totals, _, _ = selection_loss(logits.log_softmax(dim=-1), self._test_neighbors)
        head = int(totals.argmin())
        loss = float(totals[head])
        if self._best is None or loss < self._best["loss"]:
            state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self._best = {"model": state, "head": head, "loss": loss, "epoch": epoch}
        metrics = assess(self.context, logits[head].cpu(), "test")
        return {"selection_loss": loss, "head": head, **{key: metrics[key] for key in ("acc", "nmi") if key in metrics}}

    @property
    def best(self) -> dict[str, Any]:
        """The kept weights ("model"), the head, its selection loss and the epoch."""
        assert self._best is not None  # the last epoch is always evaluated
        return self._best

    def state(self) -> dict[str, Any]:
        """Return the best so far."""
        return {"best": self._best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the best so far."""
        self._best = state["best"]


def run_clustering(context: Context) -> None:
    """Train the heads (and, unless told otherwise, the backbone) and keep the best head by its loss."""
    config = context.config.clustering
    with seeded(context.config.seed, NAME):
        model = context.place(ClusterModel(context.without_pretrained, context.n_clusters, config.heads))
    model.backbone.load_state_dict(load_pretext(context).backbone.state_dict())
    if config.initialize == "kmeans" and not context.run.has(f"checkpoints/{NAME}.pt"):
        start_from_kmeans(context, model)
    if config.update == "full":
        context.features = {}  # of use to a frozen backbone alone
    stage = Clustering(context, model)
    training = train(stage, context)
    best = stage.best
    model.load_state_dict(best["model"])
    results: dict[str, Any] = {"head": best["head"], "epoch": best["epoch"], "selection_loss": best["loss"]}
    single = model.head(best["head"])
    context.logits[NAME] = {split: logits_of(context, single, split)[0].cpu() for split in splits_of(context)}
    context.features = {}
    for split, logits in context.logits[NAME].items():
        results[split] = assess(context, logits, split)
    context.run.save(FINAL, best)
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)


@torch.no_grad()
def logits_of(context: Context, model: ClusterModel, split: str) -> Tensor:
    """Return the logits (H, N, C) of a split; those of a frozen backbone's heads come from features made once."""
    if context.config.clustering.update == "full":
        return forward_all(context, model, model, splits_of(context)[split])
    # In the batches of a whole forward pass, so that another process finds the same bits.
    rows = backbone_features(context, model, split).split(context.config.evaluation.batch_size)
    with context.autocast():
        return torch.cat([model.heads(features).float() for features in rows], dim=-2)


@torch.no_grad()
def start_from_kmeans(context: Context, model: ClusterModel) -> None:
    """Set each head to a k-means solution (its own seed) of the unit features: logits fall with squared distance."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    features = backbone_features(context, model, "train")
    scale = features.norm(dim=1).mean()
    rows = (
        permutation(stream_key(context.config.seed, f"{NAME}/kmeans"), 0, len(features))[:KMEANS_IMAGES].sort().values
    )
    unit = F.normalize(features[rows.to(features.device)], dim=1).cpu().numpy().astype(np.float64)
    # A temperature at which neighbouring centres still share an image: starting sure of everything would freeze it.
    sharpness = 10.0
    for number, head in enumerate(model.cluster_head):
        # One thread: more of them add up the centres in whatever order they finish, and no two runs agree in all bits.
        with threadpool_limits(1, user_api="openmp"):
            kmeans = KMeans(model.n_clusters, n_init=3, random_state=context.config.seed * 1000 + number).fit(unit)
        centers = torch.from_numpy(kmeans.cluster_centers_).float()
        assert isinstance(head, nn.Linear)
        head.weight.copy_(2 * sharpness * centers / scale)
        head.bias.copy_(-sharpness * centers.square().sum(dim=1))


def load_clustering(context: Context) -> tuple[ClusterModel, dict[str, Any]]:
    """Return the finished single-head model and the record of how it was chosen.

    Raises:
        RunError: where stage two has not been finished.
    """
    run = context.run
    if not run.has(FINAL):
        raise RunError(f"{run.path} has no finished clustering stage; run `scan-fast cluster {run.path}` first")
    best = run.load(FINAL)
    config = context.config.clustering
    model = ClusterModel(context.without_pretrained, context.n_clusters, config.heads)
    load_strict(model, best["model"], what=str(run.path / FINAL))
    return context.place(model.head(best["head"])), best
