"""Embeddings and features of all images by the finished pretext model, and the kNN check on them.

With several ranks, each holds the rows of its share of a split (:func:`rows_of`), and no rank ever holds all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .. import distributed
from ..evaluation.probes import knn_accuracy, sharded_knn_accuracy
from ..models.heads import ClusterModel, PretextModel
from ..training.context import Context
from ..training.inference import forward_all
from .handover import EMBEDDINGS, FEATURES, UNIT_FEATURES, Handover
from .inputs import mined_rows
from .stored import features_key, stored_features


def rows_of(context: Context, split: str) -> slice:
    """Return the rows of a split that this rank embeds: all of them without other ranks."""
    return slice(*distributed.share(len(context.clustered[split]), context.config.evaluation.batch_size))


def row_counts(context: Context, split: str) -> list[int]:
    """Return the number of rows of a split that each rank embeds."""
    shares = distributed.shares(len(context.clustered[split]), context.config.evaluation.batch_size)
    return [end - begin for begin, end in shares]


def mining_space(context: Context) -> str:
    """Return the name of the values in which neighbours are searched: embeddings or features."""
    return EMBEDDINGS if context.config.mining.features == "projection" else FEATURES


def embed(context: Context, model: PretextModel, split: str, handover: Handover | None = None) -> Tensor:
    """Return (n, D) float32: a split in the space in which neighbours are searched, not normalised, on the device.

    They are the rows of :func:`rows_of`.

    Args:
        context: the run.
        model: the pretext model.
        split: "train" or "test".
        handover: holds the result; give it for the finished model only.
    """
    name = mining_space(context)

    def compute() -> Tensor:
        function = model if name == EMBEDDINGS else model.features
        return forward_all(context, model, function, context.clustered[split], gather=False)

    return compute() if handover is None else handover.get(name, split, compute)


def unit_embedding(context: Context, model: PretextModel, split: str, handover: Handover) -> Tensor:
    """Return what :func:`embed` does, as rows of length one; features of a frozen network may be another run's.

    Args:
        context: the run.
        model: the finished pretext model.
        split: "train" or "test".
        handover: holds the result if the network is not trained, and what :func:`embed` holds.
    """

    def compute() -> Tensor:
        return F.normalize(embed(context, model, split, handover), dim=1)

    def found_or_computed() -> Tensor:
        stored = distributed.on_first(lambda: stored_features(context))
        if stored is None:
            return compute()
        for name, rows in stored.items():
            handover.put(UNIT_FEATURES, name, rows[rows_of(context, name)].to(context.device))
        return handover.get(UNIT_FEATURES, split, compute)

    if distributed.on_first(lambda: features_key(context)) is None:
        return compute()
    return handover.get(UNIT_FEATURES, split, found_or_computed)


def backbone_features(context: Context, model: PretextModel | ClusterModel, split: str, handover: Handover) -> Tensor:
    """Return the (n, D) float32 features of a split by the finished pretext model's backbone, of :func:`rows_of`.

    Args:
        context: the run.
        model: has that very backbone.
        split: "train" or "test".
        handover: holds the result.
    """
    source = context.clustered[split]
    return handover.get(FEATURES, split, lambda: forward_all(context, model, model.features, source, gather=False))


def knn_check(context: Context, model: PretextModel, handover: Handover | None = None) -> dict[str, float]:
    """Return {"knn_acc": accuracy} of a weighted kNN vote of the train images on the reported split.

    Without a test split the vote on a train image leaves out the image itself. The result is {} without labels.

    Args:
        context: the run.
        model: the pretext model.
        handover: holds the embeddings; give it for the finished model only.
    """
    train, test = context.splits.train, context.splits.test
    if train.labels is None or (test is not None and test.labels is None):
        return {}
    if handover is not None and distributed.on_first(lambda: features_key(context)) is not None:
        bank = unit_embedding(context, model, "train", handover)
        queries = None if test is None else unit_embedding(context, model, "test", handover)
    else:
        bank = embed(context, model, "train", handover)
        queries = None if test is None else embed(context, model, "test", handover)
    labels = None if test is None or test.labels is None else test.labels[rows_of(context, "test")]
    config = context.config.pretext
    measure = sharded_knn_accuracy if distributed.several() else knn_accuracy
    accuracy = measure(
        bank,
        train.labels[rows_of(context, "train")],
        queries,
        labels,
        k=config.monitor_k,
        temperature=config.monitor_temperature,
    )
    return {"knn_acc": accuracy}


@torch.no_grad()
def frozen_logits(context: Context, model: ClusterModel) -> dict[str, Tensor]:
    """Return by split the (N, C) float32 logits, on the CPU, of one head on the stored backbone features."""
    rows = mined_rows(context)
    size, device = context.config.evaluation.batch_size, next(model.parameters()).device
    return {
        split: torch.cat([model.heads(part.to(device))[0].cpu() for part in torch.from_numpy(rows[split]).split(size)])
        for split in context.clustered
    }
