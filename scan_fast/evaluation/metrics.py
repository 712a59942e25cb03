"""Agreement of clusters with classes. Labels serve to report, never to train or to select."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

from .arrays import as_ids, as_matrix

_TITLES = {
    "acc_many_to_one": "ACC many-to-one",
    "acc": "ACC",
    "acc_top5": "ACC top-5",
    "nmi": "NMI",
    "ari": "ARI",
    "ami": "AMI",
}
"""The metrics in the order of tables."""


def metric_titles(found: Iterable[str]) -> dict[str, str]:
    """Return the titles of the metrics that are there, in the order of tables.

    With more clusters than classes, the accuracy by majority vote comes first, as in the SCAN paper's table of
    over-clustering, and the other accuracy is called one-to-one.

    Args:
        found: keys of what :func:`clustering_metrics` returns; others are left out.
    """
    keys = set(found)
    titles = {key: title for key, title in _TITLES.items() if key in keys}
    if "acc_many_to_one" in titles and "acc" in titles:
        titles["acc"] = "ACC one-to-one"
    return titles


PURITY_AT = (1, 5, 20)
"""Numbers of nearest neighbours whose purity is reported, as by the reference."""


def clustering_metrics(
    clusters: ArrayLike,
    labels: ArrayLike,
    n_clusters: int,
    n_classes: int,
    probabilities: ArrayLike | None = None,
) -> dict[str, float]:
    """Compare a clustering with true classes as the SCAN paper does (arXiv 2005.12320, section 3.1).

    Images with label -1 have no label and are left out.

    Args:
        clusters: (N,) the cluster of each image, from 0 to n_clusters - 1.
        labels: (N,) the class of each image, from 0 to n_classes - 1, or -1.
        n_clusters: K; clusters may be empty.
        n_classes: the number of classes; some may be absent.
        probabilities: (N, K) the clusters' probabilities, for ``acc_top5``.

    Returns:
        Fractions from 0 to 1 (``ari`` and ``ami`` may be slightly negative):

        - ``acc``: the accuracy under the best one-to-one matching of clusters to classes (Hungarian method). Clusters
          beyond the number of classes have no class, and all their images count as errors.
        - ``acc_many_to_one``, if n_clusters > n_classes: every cluster takes its most frequent class.
        - ``nmi`` (arithmetic mean), ``ami``, ``ari``.
        - ``acc_top5``, with probabilities and more than five classes and clusters: an image counts if the cluster that
          is matched to its class (one-to-one) is among its five most probable. Equal probabilities are ordered by the
          smaller cluster. Images of a class without a cluster count as errors.

    Raises:
        ValueError: for wrong shapes or ids, or if no image has a label.
    """
    cluster_ids, class_ids, keep = _labelled(clusters, labels, n_clusters, n_classes)
    counts = _contingency(cluster_ids, class_ids, n_clusters, n_classes)
    match = _one_to_one(counts)
    metrics = {"acc": _matched_fraction(counts, match)}
    if n_clusters > n_classes:
        metrics["acc_many_to_one"] = _matched_fraction(counts, _majority(counts))
    metrics["nmi"] = float(normalized_mutual_info_score(class_ids, cluster_ids))
    metrics["ari"] = float(adjusted_rand_score(class_ids, cluster_ids))
    metrics["ami"] = float(adjusted_mutual_info_score(class_ids, cluster_ids))
    if probabilities is not None:
        matrix = as_matrix(probabilities, "probabilities", rows=keep.size, columns=n_clusters)
        if n_classes > 5 and n_clusters > 5:
            metrics["acc_top5"] = _top_accuracy(matrix[keep], class_ids, match, n_classes, top=5)
    return metrics


def match_clusters(
    clusters: ArrayLike, labels: ArrayLike, n_clusters: int, n_classes: int, *, many_to_one: bool = False
) -> NDArray[np.int64]:
    """Give each cluster a class.

    Args:
        clusters: (N,) cluster ids.
        labels: (N,) class ids; images with -1 are left out.
        n_clusters: K.
        n_classes: the number of classes.
        many_to_one: give each cluster its most frequent class (the smallest of equals, -1 for an empty cluster) instead
            of the one-to-one matching with the most agreeing images.

    Returns:
        (K,) int64: the class of each cluster, or -1 for none.

    Raises:
        ValueError: as :func:`clustering_metrics`.
    """
    cluster_ids, class_ids, _ = _labelled(clusters, labels, n_clusters, n_classes)
    counts = _contingency(cluster_ids, class_ids, n_clusters, n_classes)
    return _majority(counts) if many_to_one else _one_to_one(counts)


def confusion(
    clusters: ArrayLike, labels: ArrayLike, n_clusters: int, n_classes: int, match: ArrayLike | None = None
) -> NDArray[np.int64]:
    """Count the images of each true class (row) by the class of their cluster (column).

    Args:
        clusters: (N,) cluster ids.
        labels: (N,) class ids; images with -1 are left out.
        n_clusters: K.
        n_classes: the number of classes.
        match: (K,) the class of each cluster or -1, as :func:`match_clusters` returns; None matches one to one.

    Returns:
        (n_classes, n_classes) int64, or (n_classes, n_classes + 1) if some cluster has no class: the last column
        then counts the images in such clusters.

    Raises:
        ValueError: as :func:`clustering_metrics`, or for a wrong ``match``.
    """
    cluster_ids, class_ids, _ = _labelled(clusters, labels, n_clusters, n_classes)
    counts = _contingency(cluster_ids, class_ids, n_clusters, n_classes)
    classes = _one_to_one(counts) if match is None else as_ids(match, "match", n_classes, lowest=-1)
    if classes.shape != (n_clusters,):
        raise ValueError(f"match must have one entry for each of {n_clusters} clusters, got {classes.size}")
    matrix = np.zeros((n_classes, n_classes + 1), dtype=np.int64)
    np.add.at(matrix.T, np.where(classes < 0, n_classes, classes), counts)
    return matrix if (classes < 0).any() else matrix[:, :n_classes]


def neighbor_purity(indices: ArrayLike, labels: ArrayLike, candidate_labels: ArrayLike | None = None) -> float:
    """Return the share of neighbours that have their query's class.

    Args:
        indices: (N, k) the neighbours of each query; -1 (no neighbour) is left out.
        labels: (N,) the classes of the queries; those of -1 (no label) are left out.
        candidate_labels: (M,) the classes of the images that ``indices`` count; None if these are the queries.

    Returns:
        A fraction from 0 to 1: the mean over all pairs of labelled images.

    Raises:
        ValueError: for wrong shapes or indices, or if no pair is labelled.
    """
    neighbors = np.asarray(indices)
    own = as_ids(labels, "labels", None, lowest=-1)
    others = own if candidate_labels is None else as_ids(candidate_labels, "candidate_labels", None, lowest=-1)
    if neighbors.ndim != 2 or neighbors.shape[0] != own.size or neighbors.dtype.kind not in "iu":
        raise ValueError(f"indices must be whole numbers ({own.size}, k), got {neighbors.dtype} {neighbors.shape}")
    if neighbors.size and (neighbors.min() < -1 or neighbors.max() >= others.size):
        raise ValueError(f"indices must be from -1 to {others.size - 1}, got {neighbors.min()} to {neighbors.max()}")
    # One more entry, of no class, for index -1.
    found = np.append(others, -1)[neighbors]
    valid = (found >= 0) & (own >= 0)[:, None]
    if not valid.any():
        raise ValueError("labels and indices leave no pair of labelled images to compare")
    return float((found == own[:, None])[valid].mean())


def purity_at(indices: ArrayLike, labels: ArrayLike, ks: Sequence[int] = PURITY_AT) -> dict[int, float]:
    """Return the share of the k nearest neighbours that have their query's class, for several k.

    Args:
        indices: (N, K) the neighbours of each query among the N, most similar first, without the query itself; -1 (no
            neighbour) is left out.
        labels: (N,) the classes; images of -1 (no label) are left out.
        ks: numbers of neighbours, at least 1 each; those above K are left out of the result.

    Returns:
        By k, the :func:`neighbor_purity` of the first k columns.

    Raises:
        ValueError: as :func:`neighbor_purity`, or for a k below 1.
    """
    if any(k < 1 for k in ks):
        raise ValueError(f"ks must be at least 1, got {min(ks)}")
    neighbors = np.asarray(indices)
    if neighbors.ndim != 2:
        raise ValueError(f"indices must be whole numbers (N, K), got {neighbors.dtype} {neighbors.shape}")
    return {k: neighbor_purity(neighbors[:, :k], labels) for k in ks if k <= neighbors.shape[1]}


def _labelled(
    clusters: ArrayLike, labels: ArrayLike, n_clusters: int, n_classes: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    cluster_ids = as_ids(clusters, "clusters", n_clusters)
    class_ids = as_ids(labels, "labels", n_classes, lowest=-1)
    if cluster_ids.shape != class_ids.shape:
        raise ValueError(f"clusters and labels must be of one length, got {cluster_ids.size} and {class_ids.size}")
    keep = class_ids >= 0
    if not keep.any():
        raise ValueError("labels must hold at least one label (not -1) to compare the clusters with")
    return cluster_ids[keep], class_ids[keep], keep


def _contingency(
    clusters: NDArray[np.int64], labels: NDArray[np.int64], n_clusters: int, n_classes: int
) -> NDArray[np.int64]:
    """Return (n_clusters, n_classes) counts."""
    flat = np.bincount(clusters * n_classes + labels, minlength=n_clusters * n_classes)
    return flat.reshape(n_clusters, n_classes)


def _one_to_one(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    match = np.full(counts.shape[0], -1, dtype=np.int64)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    match[rows] = columns
    return match


def _majority(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def _matched_fraction(counts: NDArray[np.int64], match: NDArray[np.int64]) -> float:
    clusters = np.flatnonzero(match >= 0)
    return float(counts[clusters, match[clusters]].sum() / counts.sum())


def _top_accuracy(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    match: NDArray[np.int64],
    n_classes: int,
    top: int,
) -> float:
    cluster_of_class = np.full(n_classes, -1, dtype=np.int64)
    matched = np.flatnonzero(match >= 0)
    cluster_of_class[match[matched]] = matched
    wanted = cluster_of_class[labels]
    own = np.take_along_axis(probabilities, np.maximum(wanted, 0)[:, None], axis=1)
    before = np.arange(probabilities.shape[1]) < wanted[:, None]
    rank = ((probabilities > own) | ((probabilities == own) & before)).sum(axis=1)
    return float(((rank < top) & (wanted >= 0)).mean())
