"""Stage two: a clustering head under the SCAN loss, where neighbours agree and clusters spread."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.random import integers, permutation, stream_key
from ..evaluation.consistency import selection_loss
from ..losses import scan_loss
from ..models.heads import ClusterModel
from ..models.weights import load_strict
from ..runs.folder import RunError
from .context import Context, seeded
from .inference import forward_all
from .loop import Stage, train
from .mining import load_neighbors
from .pretext import load_pretext
from .results import assess, final_logits

NAME = "clustering"
FINAL = f"checkpoints/{NAME}-final.pt"
NEIGHBOR_DRAW = 2
"""The number of the random stream that draws neighbours; 0 and 1 are the views of anchor and neighbour."""
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
        if self.config.update == "heads":
            model.backbone.requires_grad_(False)

    def train_mode(self) -> None:
        """Heads alone are trained on the features of a backbone in evaluation mode, as in the original."""
        self.model.train(self.config.update == "full")

    def batch(self, epoch: int, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Render each anchor and one neighbour of it, drawn anew every epoch."""
        choices = self._neighbors.shape[1]
        draw = integers(self._views.key, epoch, indices, NEIGHBOR_DRAW, choices)
        chosen = self._neighbors[indices, draw]
        anchors = self._views(self._view, indices, epoch=epoch, view_index=0)
        neighbors = self._views(self._view, chosen, epoch=epoch, view_index=1, samples=indices)
        return anchors, neighbors

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the heads' losses; anchors and neighbours have batch statistics of their own."""
        if self.config.update == "heads":
            with torch.no_grad():
                features = [self.model.features(images) for images in batch]
            anchors, neighbors = (self.model.heads(f) for f in features)
        else:
            anchors, neighbors = (self.model(images) for images in batch)
        total, consistency, entropy = scan_loss(anchors, neighbors, self.config.entropy_weight)
        return total.sum(), {"loss": total.mean(), "consistency": consistency.mean(), "entropy": entropy.mean()}

    def end_epoch(self, epoch: int, last: bool) -> dict[str, float]:
        """Pick the head, and keep the epoch, of lowest SCAN loss on the held-out images; labels have no part in it."""
        if not last and epoch % self.config.evaluate_every:
            return {}
        logits = forward_all(self.context, self.model, self.model, self.context.splits.test)
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
        model = context.place(ClusterModel(context.untrained, context.n_clusters, config.heads))
    model.backbone.load_state_dict(load_pretext(context).backbone.state_dict())
    if config.initialize == "kmeans" and not context.run.has(f"checkpoints/{NAME}.pt"):
        start_from_kmeans(context, model)
    stage = Clustering(context, model)
    training = train(stage, context)
    best = stage.best
    model.load_state_dict(best["model"])
    results: dict[str, Any] = {"head": best["head"], "epoch": best["epoch"], "selection_loss": best["loss"]}
    context.logits.pop(NAME, None)
    for split, logits in final_logits(context, model.head(best["head"]), NAME).items():
        results[split] = assess(context, logits, split)
    context.run.save(FINAL, best)
    context.run.finish_stage(NAME, training.seconds, {**training.notes, **results}, context.config.seed)


@torch.no_grad()
def start_from_kmeans(context: Context, model: ClusterModel) -> None:
    """Set each head to a k-means solution (its own seed) of the unit features: logits fall with squared distance."""
    from sklearn.cluster import KMeans
    from threadpoolctl import threadpool_limits

    features = forward_all(context, model, model.features, context.splits.train)
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
        assert isinstance(head, torch.nn.Linear)
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
    model = ClusterModel(context.untrained, context.n_clusters, config.heads)
    load_strict(model, best["model"], what=str(run.path / FINAL))
    return context.place(model.head(best["head"])), best
