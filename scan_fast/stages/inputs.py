"""Finished results of stages, read from the run folder: what a stage takes as input, whichever stage wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunError
from ..models.heads import ClusterModel, PretextModel
from ..models.weights import load_strict
from ..runs.artifacts import CLUSTER_MODEL, EMBEDDINGS, NEIGHBORS, PRETEXT_MODEL, SELFLABEL_MODEL, Artifact
from ..training.context import Context

T = TypeVar("T", np.float32, np.int64)


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
    for split in context.clustered:
        index = torch.from_numpy(_of_split(context, NEIGHBORS, mined, split))
        own = torch.arange(len(index))[:, None]
        neighbors[split] = torch.where(index >= 0, index, own)
    return neighbors


def mined_embeddings(context: Context) -> dict[str, NDArray[np.float32]]:
    """Return the embeddings by split, each (N, D) float32 in the order of the images.

    Raises:
        RunError: if mining is not finished, or its result is of other images.
    """
    rows = context.run.read(EMBEDDINGS).rows
    return {split: _of_split(context, EMBEDDINGS, rows, split) for split in context.clustered}


def _of_split(context: Context, artifact: Artifact[Any], arrays: Mapping[str, NDArray[T]], split: str) -> NDArray[T]:
    """Return the rows of a split's images in an artifact of mining."""
    rows, expected = arrays.get(split), len(context.clustered[split])
    found = 0 if rows is None else len(rows)
    if rows is None or found != expected:
        raise RunError(
            f"{context.run.path_of(artifact)} is of {found} {split} images, there are {expected} now; "
            "the images have changed since: start again in a new folder"
        )
    return rows


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
    if not isinstance(head, int) or not 0 <= head < heads:
        raise RunError(
            f"{run.path_of(CLUSTER_MODEL)} is damaged: its best head is {head!r} of {heads}; "
            f"repeat what wrote it: scan-fast {CLUSTER_MODEL.command} {run.path} --again"
        )
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
