"""Metrics against labels, probes of features, the label-free selection loss, and prototypes of clusters."""

from .metrics import clustering_metrics, confusion, match_clusters, neighbor_purity
from .model_selection import selection_loss
from .probes import kmeans_baseline, kmeans_metrics, knn_accuracy, linear_probe
from .prototypes import Prototypes, prototypes

__all__ = [
    "Prototypes",
    "clustering_metrics",
    "confusion",
    "kmeans_baseline",
    "kmeans_metrics",
    "knn_accuracy",
    "linear_probe",
    "match_clusters",
    "neighbor_purity",
    "prototypes",
    "selection_loss",
]
