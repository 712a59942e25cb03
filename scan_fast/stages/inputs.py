"""Finished results of stages, read from the run folder: what a stage takes as input, whichever stage wrote it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunError
from ..models.heads import ClusterModel, PretextModel
from ..models.weights import load_strict
from ..runs.artifacts import CLUSTER_MODEL, EMBEDDINGS, NEIGHBORS, PRETEXT_MODEL, SELFLABEL_MODEL, Artifact
from ..runs.records import StageResult
from ..training.context import Context


def pretext_model(context: Context) -> PretextModel:
    """Return the finished pretext model on the run's device.

    Raises:
        RunError: if the pretext stage is not finished.
    """
    run = context.run
    run.require(PRETEXT_MODEL)
    model = PretextModel(context.without_pretrained)
    load_strict(model, _result(context, PRETEXT_MODEL).model, what=str(run.path_of(PRETEXT_MODEL)))
    return context.place(model)


def mined_neighbors(context: Context) -> dict[str, Tensor]:
    """Return the mined indices by split, each (N, k) int64; an image without neighbours is its own neighbour.

    Raises:
        RunError: if mining is not finished, or its result is of other images.
    """
    run = context.run
    run.require(NEIGHBORS)
    mined = run.read(NEIGHBORS)
    _check_images(context, NEIGHBORS, mined.images)
    _check_counts(context, NEIGHBORS, mined.index)
    neighbors = {}
    for split in context.clustered:
        index = torch.from_numpy(mined.index[split])
        own = torch.arange(len(index))[:, None]
        neighbors[split] = torch.where(index >= 0, index, own)
    return neighbors


def mined_rows(context: Context) -> dict[str, NDArray[np.float32]]:
    """Return the stored embeddings by split, each (N, D) float32 unit rows in the order of the images.

    Raises:
        RunError: if there are none, or they are of other images.
    """
    found = context.run.read(EMBEDDINGS)
    _check_images(context, EMBEDDINGS, found.images)
    _check_counts(context, EMBEDDINGS, found.rows)
    return found.rows


def _result(context: Context, artifact: Artifact[StageResult]) -> StageResult:
    result = context.run.read(artifact)
    _check_images(context, artifact, result.images)
    return result


def _check_images(context: Context, artifact: Artifact[Any], images: str | None) -> None:
    """Refuse a result that was made of other images; one that does not tell may be of these."""
    ours = context.run.images_digest
    if images is not None and ours is not None and images != ours:
        raise RunError(
            f"{context.run.path_of(artifact)} was made of other images than those of this run; "
            f"{context.run.repair_of(artifact)}"
        )


def _check_counts(context: Context, artifact: Artifact[Any], rows: Mapping[str, NDArray[Any]]) -> None:
    found, wanted = {split: len(each) for split, each in rows.items()}, context.counts_by_split
    if found != wanted:
        of, here = (", ".join(f"{count} {split} images" for split, count in each.items()) for each in (found, wanted))
        raise RunError(
            f"{context.run.path_of(artifact)} is of {of}, this run is of {here}; {context.run.repair_of(artifact)}"
        )


def cluster_model(context: Context) -> tuple[ClusterModel, dict[str, Any]]:
    """Return the finished single-head model of the clustering stage, and the record of how it was chosen.

    Raises:
        RunError: if the clustering stage is not finished.
    """
    run = context.run
    run.require(CLUSTER_MODEL)
    best = _result(context, CLUSTER_MODEL)
    heads = context.config.clustering.saved_heads
    model = ClusterModel(context.without_pretrained, context.n_clusters, heads)
    load_strict(model, best.model, what=str(run.path_of(CLUSTER_MODEL)))
    head = best.record.get("head")
    if not isinstance(head, int) or not 0 <= head < heads:
        raise RunError(
            f"{run.path_of(CLUSTER_MODEL)} names head {head} of {heads} as the best; {run.repair_of(CLUSTER_MODEL)}"
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
    load_strict(model, _result(context, SELFLABEL_MODEL).model, what=str(run.path_of(SELFLABEL_MODEL)))
    return context.place(model)
