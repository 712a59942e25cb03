"""Metrics of predictions on a split of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..data.sources import Source
from ..evaluation.metrics import clustering_metrics
from ..models.heads import ClusterModel
from ..training.context import Context
from ..training.inference import forward_all


@dataclass(frozen=True)
class Outputs:
    """The output of a model with one head for N images.

    Attributes:
        logits: (N, C) float32, on the CPU.
        features: (N, D) float32 features that the head sees, on the CPU; None if they were not asked for.
    """

    logits: Tensor
    features: Tensor | None


def outputs(context: Context, model: ClusterModel, source: Source, *, features: bool) -> Outputs:
    """Return the logits of all images of a source and, from the same pass, the features if they are asked for."""
    if not features:
        return Outputs(forward_all(context, model, model, source)[0].cpu(), None)

    def both(images: Tensor) -> Tensor:
        found = model.features(images)
        if context.model_config.unit_features:
            found = F.normalize(found, dim=1)
        return torch.cat([model.heads(found)[0].float(), found.float()], dim=1)

    logits, found = (
        forward_all(context, model, both, source).cpu().split_with_sizes((model.n_clusters, model.out_features), dim=1)
    )
    return Outputs(logits, found)


def assess(context: Context, logits: Tensor, split: str) -> dict[str, float]:
    """Measure one head's predictions of a split.

    Args:
        context: the run.
        logits: (N, C) of all the split's images.
        split: "train" or "test".

    Returns:
        clusters_used, confidence (mean of the largest probability) and, if there are labels, acc, nmi, ari, ami and
        what else fits the numbers of clusters and classes.
    """
    labels = context.clustered[split].labels
    probabilities = logits.softmax(dim=1)
    confidence, clusters = probabilities.max(dim=1)
    metrics = {"clusters_used": float(clusters.unique().numel()), "confidence": float(confidence.mean())}
    if labels is not None and context.n_classes is not None:
        metrics |= clustering_metrics(
            clusters.numpy(), labels.numpy(), context.n_clusters, context.n_classes, probabilities.numpy()
        )
    return metrics
