"""Finished results of stages, read from the run folder: what a stage takes as input, whichever stage wrote it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RunError
from ..models.heads import ClusterModel, PretextModel
from ..models.weights import load_strict
from ..runs.artifacts import CLUSTER_MODEL, NEIGHBORS, PRETEXT_MODEL, SELFLABEL_MODEL
from ..training.context import Context


def pretext_model(context: Context) -> PretextModel:
    """Return the finished pretext model on the run's device.

    Raises:
        RunError: if the pretext stage is not finished.
    """
    run = context.run
    run.require(PRETEXT_MODEL)
    model = PretextModel(context.without_pretrained)
    load_strict(model, run.read(PRETEXT_MODEL).model, what=str(run.path_of(PRETEXT_MODEL)))
    return context.place(model)


def mined_neighbors(context: Context) -> dict[str, Tensor]:
    """Return the mined indices by split, each (N, k) int64; an image without neighbours is its own neighbour.

    Raises:
        RunError: if mining is not finished, or its result is of other images.
    """
    run = context.run
    run.require(NEIGHBORS)
    mined = run.read(NEIGHBORS).index
    neighbors = {}
    for split, source in context.clustered.items():
        if split not in mined:
            raise RunError(f"{run.path_of(NEIGHBORS)} lacks the {split} images: it is not of this run")
        index = torch.from_numpy(mined[split])
        if len(index) != len(source):
            raise RunError(
                f"{run.path_of(NEIGHBORS)} is of {len(index)} {split} images, there are {len(source)} now; "
                "the images have changed since: start again in a new folder"
            )
        own = torch.arange(len(index))[:, None]
        neighbors[split] = torch.where(index >= 0, index, own)
    return neighbors


def cluster_model(context: Context) -> tuple[ClusterModel, dict[str, Any]]:
    """Return the finished single-head model of the clustering stage, and the record of how it was chosen.

    Raises:
        RunError: if the clustering stage is not finished.
    """
    run = context.run
    run.require(CLUSTER_MODEL)
    best = run.read(CLUSTER_MODEL)
    heads = context.config.clustering.saved_heads
    model = ClusterModel(context.without_pretrained, context.n_clusters, heads)
    load_strict(model, best.model, what=str(run.path_of(CLUSTER_MODEL)))
    head = best.record.get("head")
    if head is None or head >= heads:
        raise RunError(f"{run.path_of(CLUSTER_MODEL)} names the head {head} as the best; it has {heads}, from 0")
    return context.place(model.head(head)), best.record


def selflabelled_model(context: Context) -> ClusterModel:
    """Return the finished model of the self-labelling stage.

    Raises:
        RunError: if the self-labelling stage is not finished.
    """
    run = context.run
    run.require(SELFLABEL_MODEL)
    model = ClusterModel(context.without_pretrained, context.n_clusters)
    load_strict(model, run.read(SELFLABEL_MODEL).model, what=str(run.path_of(SELFLABEL_MODEL)))
    return context.place(model)
