"""Results of a finished run: assignments, the confusion matrix, the saved model and the baselines."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import distributed
from ..data.sources import Source, SubsetSource
from ..evaluation.metrics import confusion, match_clusters
from ..evaluation.probes import kmeans_baseline, kmeans_metrics
from ..evaluation.typicality import Typicality
from ..models.heads import ClusterModel
from ..models.saved import SavedModel
from ..random import permutation, stream_key
from ..report.figures import confusion_png
from ..runs import artifacts
from ..runs.tables import Assignments, Confusion, Predictions, Skipped
from ..training.context import Context, data_settings
from ..training.inference import forward_all
from .embedding import backbone_features, frozen_logits, row_counts
from .handover import CLUSTERING_LOGITS, SELFLABEL_LOGITS, Handover
from .inputs import mined_rows

MOST_PIXELS = 1 << 30
"""Largest size in bytes of the training images, as float32, for which k-means on pixels is a baseline; each of its
repetitions takes as much memory again."""

PIXEL_SIDE = 96
"""Larger images are averaged down to this side for k-means on pixels."""

TYPICALITY_IMAGES = 5_000
"""Largest number of training images, drawn at random, whose features are computed for the typicality of new images."""

_INPUTS = {"kmeans_pixels": "pixels", "kmeans_features": "features"}


def final_logits(context: Context, model: ClusterModel, name: str, handover: Handover) -> dict[str, Tensor]:
    """Return by split the (N, C) logits, on the CPU, of a finished model with one head.

    Args:
        context: the run.
        model: the finished model of the stage that hands on ``name``.
        name: CLUSTERING_LOGITS or SELFLABEL_LOGITS.
        handover: holds the logits if the stage was done in this process.
    """

    def compute(source: Source) -> Tensor:
        return forward_all(context, model, model, source)[0].cpu()

    if name == CLUSTERING_LOGITS and not context.config.clustering.trains:
        return distributed.on_first(lambda: frozen_logits(context, model))
    return {
        split: handover.get(name, split, lambda source=source: compute(source))  # type: ignore[misc]
        for split, source in context.clustered.items()
    }


def write_results(context: Context, model: ClusterModel, stage: str, handover: Handover) -> None:
    """Write assignments.csv, model.pt and, with labels, confusion.csv and confusion.png, from the final model."""
    name = SELFLABEL_LOGITS if stage == "selflabel" else CLUSTERING_LOGITS
    logits = final_logits(context, model, name, handover)
    typical = typicality(context, model, stage, logits["train"], handover)
    distributed.on_first(lambda: _write(context, model, stage, logits, typical))


def _write(context: Context, model: ClusterModel, stage: str, logits: dict[str, Tensor], typical: Typicality) -> None:
    table = assignments(context, logits)
    aside = context.run.set_names_aside(table)
    if aside is not None:
        context.tracker.say(f"the groups are not those that were named; their names are in {aside.name} now")
    context.run.write_assignments(table)
    context.run.write(artifacts.MODEL, saved_model(context, model, stage, typical))
    reported = context.clustered[context.reported]
    labels = reported.labels
    if labels is not None and context.n_classes is not None:
        clusters = logits[context.reported].argmax(dim=1).numpy()
        many_to_one = context.n_clusters > context.n_classes
        match = match_clusters(clusters, labels.numpy(), context.n_clusters, context.n_classes, many_to_one=many_to_one)
        matrix = confusion(clusters, labels.numpy(), context.n_clusters, context.n_classes, match)
        assert reported.class_names is not None
        counts = Confusion.of(matrix, reported.class_names)
        context.run.write(artifacts.CONFUSION, counts)
        context.run.write(artifacts.CONFUSION_FIGURE, confusion_png(counts))


def assignments(context: Context, logits: dict[str, Tensor]) -> Assignments:
    """Return the cluster of every image and, if there are classes, its label.

    Args:
        context: the run.
        logits: by split, (N, C).
    """
    names = context.splits.train.class_names if context.n_classes is not None else None
    parts, labels = {}, {}
    for split, source in context.clustered.items():
        parts[split] = Predictions.of(source.paths, logits[split].softmax(dim=1))
        numbers = [-1] * len(source) if source.labels is None else source.labels.tolist()
        labels[split] = [names[number] if names and number >= 0 else "" for number in numbers]
    return Assignments.join(parts, labels if names else None)


def typicality(context: Context, model: ClusterModel, stage: str, logits: Tensor, handover: Handover) -> Typicality:
    """Return the centres of the clusters in feature space, from training images.

    A backbone that stayed frozen has computed the features of all images before. Otherwise a sample must do.

    Args:
        context: the run.
        model: the finished model, with one head.
        stage: the stage whose result it is.
        logits: (N, C) of the training images.
        handover: holds the features of a frozen backbone if the clustering stage was done in this process.
    """
    clusters = logits.argmax(dim=1)
    if stage == "clustering" and context.config.clustering.update == "heads":
        own = backbone_features(context, model, "train", handover)
        features = distributed.all_rows(own, row_counts(context, "train"))
    elif stage == "clustering" and not context.config.clustering.trains:
        return distributed.on_first(
            lambda: Typicality.of(torch.from_numpy(mined_rows(context)["train"]), clusters, context.n_clusters)
        )
    else:
        source = context.splits.train
        order = permutation(stream_key(context.config.seed, "typicality"), 0, len(source))
        rows = order[:TYPICALITY_IMAGES].sort().values
        clusters = clusters[rows]
        features = forward_all(context, model, model.features, SubsetSource(source, rows))
    return Typicality.of(features.cpu(), clusters, context.n_clusters)


def saved_model(context: Context, model: ClusterModel, stage: str, typical: Typicality) -> SavedModel:
    """Return the content of model.pt.

    Args:
        context: the run.
        model: the finished model, with one head.
        stage: the stage whose result it is.
        typical: the centres of its clusters.
    """
    size = context.plain_view.size
    assert size is not None
    return SavedModel(
        stage=stage,
        model=context.without_pretrained,
        n_clusters=context.n_clusters,
        size=context.splits.train.size,
        view_size=size,
        crop=context.config.data.crop,
        decode=context.config.data.decode,
        mean=context.splits.mean,
        std=context.splits.std,
        state_dict={name: value.cpu() for name, value in model.state_dict().items()},
        interpolation=data_settings(context.config, context.input).filter,
        **vars(typical),
    )


def write_skipped(context: Context) -> list[tuple[str, str]]:
    """Write skipped.csv if images could not be read, and return their paths with the reasons."""
    sources = [*context.clustered.values(), context.splits.pretext]
    # Subsets of one source share its list.
    skipped = sorted({entry for source in sources if source is not None for entry in source.skipped})
    if skipped:
        context.run.write(artifacts.SKIPPED, Skipped(skipped))
    else:
        context.run.remove(artifacts.SKIPPED)
    return skipped


def baselines(context: Context) -> dict[str, dict[str, float]]:
    """Return the metrics of k-means (mean and deviation over seeds) on pixels and on the mined features.

    They are of the reported split, by the centres of the training images. It is empty without labels. Images of more
    than ``PIXEL_SIDE`` pixels are averaged down to that size. Pixels are left out if there are too many of them. With
    several ranks, rank 0 computes them.
    """
    return distributed.on_first(lambda: _baselines(context))


def _baselines(context: Context) -> dict[str, dict[str, float]]:
    train, reported = context.splits.train, context.clustered[context.reported]
    if reported.labels is None or context.n_classes is None:
        return {}
    seeds = range(context.config.evaluation.baseline_seeds)
    inputs: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if 12 * min(train.size, PIXEL_SIDE) ** 2 * len(train) <= MOST_PIXELS:
        inputs["kmeans_pixels"] = (_pixels(train), _pixels(reported))
    if context.run.has(artifacts.EMBEDDINGS):
        embeddings = mined_rows(context)
        inputs["kmeans_features"] = (embeddings["train"], embeddings[context.reported])
    repeated = context.config.evaluation.baseline_seeds
    context.tracker.say(f"baselines: k-means on {' and '.join(_INPUTS[name] for name in inputs)}, {repeated} times")
    return {
        name: kmeans_metrics(
            kmeans_baseline(fit, applied, context.n_clusters, seeds),
            reported.labels.numpy(),
            context.n_clusters,
            context.n_classes,
        )
        for name, (fit, applied) in inputs.items()
    }


def _pixels(source: Source) -> np.ndarray:
    side = min(source.size, PIXEL_SIDE)
    pixels = np.empty((len(source), 3 * side**2), dtype=np.float32)
    for rows in torch.arange(len(source)).split(256):
        images = source.read(rows)
        if side < source.size:
            images = F.interpolate(images.movedim(-1, 1).float(), size=(side, side), mode="area").movedim(1, -1)
        pixels[rows.numpy()] = images.flatten(1).cpu().numpy()
    return pixels
