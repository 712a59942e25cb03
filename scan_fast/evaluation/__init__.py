"""Evaluation: metrics against labels, probes of features, and the label-free selection loss."""

from .metrics import clustering_metrics, confusion, match_clusters, neighbor_purity, row_shares, save_confusion
from .model_selection import selection_loss
from .probes import kmeans_baseline, kmeans_metrics, knn_accuracy, linear_probe
from .prototypes import ClusterPrototypes, prototypes

__all__ = [
    "ClusterPrototypes",
    "clustering_metrics",
    "confusion",
    "kmeans_baseline",
    "kmeans_metrics",
    "knn_accuracy",
    "linear_probe",
    "match_clusters",
    "neighbor_purity",
    "prototypes",
    "row_shares",
    "save_confusion",
    "selection_loss",
]
