"""Finished results of stages, read from the run folder: what a stage takes as input, whichever stage wrote it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.heads import ClusterModel, PretextModel
from ..models.weights import load_strict
from ..runs.folder import RunError, RunFolder
from ..training.context import Context

PRETEXT_MODEL = "checkpoints/pretext-final.pt"
EMBEDDINGS_FILE = "embeddings.npz"
NEIGHBORS_FILE = "neighbors.npz"
CLUSTER_MODEL = "checkpoints/clustering-final.pt"
SELFLABEL_MODEL = "checkpoints/selflabel-final.pt"

_MISSING = {
    PRETEXT_MODEL: ("pretext", "finished pretext stage", "pretext"),
    EMBEDDINGS_FILE: ("mining", "embeddings", "mine"),
    NEIGHBORS_FILE: ("mining", "mined neighbours", "mine"),
    CLUSTER_MODEL: ("clustering", "finished clustering stage", "cluster"),
    SELFLABEL_MODEL: ("selflabel", "finished self-labelling stage", "selflabel"),
}


def require(run: RunFolder, name: str) -> None:
    """Refuse to go on without a file that a finished stage writes.

    Raises:
        RunError: names what is missing and the command that writes it.
    """
    stage, missing, command = _MISSING[name]
    if not run.has(name) or not run.finished(stage):
        raise RunError(f"{run.path} has no {missing}; run `scan-fast {command} {run.path}` first")


def pretext_model(context: Context) -> PretextModel:
    """Return the finished pretext model on the run's device.

    Raises:
        RunError: if the pretext stage is not finished.
    """
    run = context.run
    require(run, PRETEXT_MODEL)
    model = PretextModel(context.without_pretrained)
    load_strict(model, run.load(PRETEXT_MODEL)["model"], what=str(run.path / PRETEXT_MODEL))
    return context.place(model)


def mined_neighbors(context: Context) -> dict[str, Tensor]:
    """Return the mined indices by split, each (N, k) int64; an image without neighbours is its own neighbour.

    Raises:
        RunError: if mining is not finished, or its result is of other images.
    """
    run = context.run
    require(run, NEIGHBORS_FILE)
    arrays = run.arrays(NEIGHBORS_FILE)
    neighbors = {}
    for split, source in context.clustered.items():
        index = torch.from_numpy(arrays[split])
        if len(index) != len(source):
            raise RunError(
                f"{run.path / NEIGHBORS_FILE} is of {len(index)} {split} images, there are {len(source)} now; "
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
    require(run, CLUSTER_MODEL)
    best = run.load(CLUSTER_MODEL)
    model = ClusterModel(context.without_pretrained, context.n_clusters, context.config.clustering.heads)
    load_strict(model, best["model"], what=str(run.path / CLUSTER_MODEL))
    return context.place(model.head(best["head"])), best


def selflabelled_model(context: Context) -> ClusterModel:
    """Return the finished model of the self-labelling stage.

    Raises:
        RunError: if the self-labelling stage is not finished.
    """
    run = context.run
    require(run, SELFLABEL_MODEL)
    model = ClusterModel(context.without_pretrained, context.n_clusters)
    load_strict(model, run.load(SELFLABEL_MODEL)["model"], what=str(run.path / SELFLABEL_MODEL))
    return context.place(model)
