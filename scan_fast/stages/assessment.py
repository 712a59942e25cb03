"""Metrics of predictions on a split of a run."""

from __future__ import annotations

from torch import Tensor

from ..evaluation.metrics import clustering_metrics
from ..training.context import Context


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
