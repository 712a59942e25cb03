"""Probes of feature quality: weighted kNN, k-means and a linear classifier on frozen features."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.cluster import KMeans
from torch import Tensor
from torch.nn import functional as F

from scan_fast.neighbors import topk_neighbors
from scan_fast.ops.agreement import gather_checked, require_same
from scan_fast.ops.collectives import rows_of_all_ranks, several_ranks
from scan_fast.ops.sharded_neighbors import sharded_topk_neighbors
from scan_fast.threads import on_all_cores

from .arrays import as_array, as_matrix
from .metrics import clustering_metrics

_QUERIES_PER_CHUNK = 4096
_NO_LABEL = "{} must hold at least one label (not -1)"
_TOO_FEW = "bank must hold at least 2 labelled images if there are no queries, got {}"


def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    k: int = 100,
    temperature: float = 0.1,
) -> float:
    """Compute the accuracy of weighted kNN (instance discrimination, arXiv 1805.01978, section 3.4).

    Each of the k most similar bank images (cosine) votes for its class with weight ``exp(similarity / temperature)``.
    Images with label -1 are excluded from the bank and from the queries. Ties go to the smaller class. A query without
    neighbours (its features are not finite) counts as an error.

    Args:
        bank: (N, D) features with known classes.
        bank_labels: (N,) integers.
        queries: (Q, D) features, on the device of ``bank``; a bank image is not excluded from its own vote. None: the
            bank's images, each left out of its own vote.
        query_labels: (Q,) integers; None with ``queries``.
        k: number of neighbours that vote; reduced to the number of labelled bank images (but the query) if larger.
        temperature: positive.

    Returns:
        A fraction from 0 to 1.

    Raises:
        ValueError: for wrong shapes, k or temperature, if the bank or the queries have no label, or if there are
            fewer than two labelled bank images and no queries.
    """
    _check_vote(k, temperature)
    bank, bank_labels = _with_labels(bank, bank_labels, "bank", "bank_labels")
    if queries is None:
        if bank.shape[0] < 2:
            raise ValueError(_TOO_FEW.format(bank.shape[0]))
        similarity, index = topk_neighbors(bank, min(k, bank.shape[0] - 1))
        query_labels = bank_labels
    else:
        queries, query_labels = _with_labels(queries, query_labels, "queries", "query_labels")
        similarity, index = topk_neighbors(bank, min(k, bank.shape[0]), queries=queries)
    return _right_votes(similarity, index, bank_labels, query_labels, temperature) / query_labels.shape[0]


def sharded_knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor | None = None,
    query_labels: Tensor | None = None,
    *,
    k: int = 100,
    temperature: float = 0.1,
) -> float:
    """Compute :func:`knn_accuracy` of images that are spread over the ranks of the default process group.

    Every rank passes its part, and gets what :func:`knn_accuracy` returns for all parts in the order of ranks. The bank
    passes round a ring (:func:`scan_fast.ops.sharded_neighbors.sharded_topk_neighbors`). Only its labels are gathered:
    8 bytes per image. Without a process group, or with one process, it is :func:`knn_accuracy`.

    Args:
        bank: (n_r, D) features of this rank, with known classes; n_r may differ between ranks, and be 0.
        bank_labels: (n_r,) integers; -1 for no label. A rank may have no label, but not all ranks.
        queries: (q_r, D) features of this rank, on the device of ``bank``; None, on every rank, for the bank's images,
            each left out of its own vote.
        query_labels: (q_r,) integers; None with ``queries``.
        k: number of neighbours that vote; reduced to the number of labelled bank images (but the query) if larger.
        temperature: positive.

    Returns:
        A fraction from 0 to 1, the same on every rank.

    Raises:
        ValueError: on every rank, for what :func:`knn_accuracy` raises it for on any of them, or if ranks disagree
            about k, temperature, the features or whether there are queries.
    """
    if not several_ranks():
        return knn_accuracy(bank, bank_labels, queries, query_labels, k=k, temperature=temperature)
    numbers, fault = [0] * 5, None
    try:
        _check_vote(k, temperature)
        bank, bank_labels = _labelled_only(bank, bank_labels, "bank", "bank_labels")
        if queries is not None:
            queries, query_labels = _labelled_only(queries, query_labels, "queries", "query_labels")
        # A float has no place among integers, but its bits have.
        (bits,) = struct.unpack("<q", struct.pack("<d", temperature))
        asked = bank if queries is None else queries
        numbers = [len(bank), len(asked), queries is not None, min(k, 2**62), bits]
    except (ValueError, TypeError, RuntimeError) as error:  # torch.as_tensor raises all three
        fault = str(error)
    counts, asked_counts, given, ks, temperatures = zip(*gather_checked(numbers, fault), strict=True)
    require_same(
        {
            "queries": ["queries" if has_queries else "queries=None" for has_queries in given],
            "k": ks,
            "temperature": [struct.unpack("<d", struct.pack("<q", bits))[0] for bits in temperatures],
        }
    )
    total, n_queries = sum(counts), sum(asked_counts)
    if total < 1 or n_queries < 1:
        raise ValueError(_NO_LABEL.format("query_labels" if total else "bank_labels"))
    if queries is None and total < 2:
        raise ValueError(_TOO_FEW.format(total))
    similarity, index = sharded_topk_neighbors(bank, min(k, total - int(queries is None)), queries=queries)
    all_labels = rows_of_all_ranks(bank_labels[:, None], counts)[:, 0]
    own_labels = bank_labels if queries is None else query_labels
    assert own_labels is not None
    right = _right_votes(similarity, index, all_labels, own_labels, temperature)
    return sum(count for (count,) in gather_checked([right], None)) / n_queries


def _check_vote(k: int, temperature: float) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


def _right_votes(
    similarity: Tensor, index: Tensor, bank_labels: Tensor, query_labels: Tensor, temperature: float
) -> int:
    """Return how many queries get their own class from the votes of their neighbours, (Q, k) each."""
    n_classes = int(bank_labels.max()) + 1
    # Relative to the nearest neighbour: the result is the same, and small temperatures do not overflow.
    weight = ((similarity - similarity[:, :1]) / temperature).exp().masked_fill(index < 0, 0)
    correct = 0
    for start in range(0, query_labels.shape[0], _QUERIES_PER_CHUNK):
        rows = slice(start, start + _QUERIES_PER_CHUNK)
        votes = weight.new_zeros((weight[rows].shape[0], n_classes))
        votes.scatter_add_(1, bank_labels[index[rows].clamp_min(0)], weight[rows])
        answered = index[rows, 0] >= 0
        correct += int(((votes.argmax(dim=1) == query_labels[rows]) & answered).sum())
    return correct


def kmeans_baseline(
    train: ArrayLike | Tensor, test: ArrayLike | Tensor, n_clusters: int, seeds: Sequence[int], *, n_init: int = 1
) -> NDArray[np.int64]:
    """Fit k-means to the L2-normalised features ``train`` and assign those of ``test``, once per seed.

    Args:
        train: (N, D) features, N at least ``n_clusters``.
        test: (M, D) features.
        n_clusters: K.
        seeds: seeds of the k-means++ initialisations.
        n_init: initialisations per seed; the one with the lowest inertia is used.

    Returns:
        (len(seeds), M) int64 cluster ids of the test images.

    Raises:
        ValueError: for wrong shapes, features that are not finite, or too few images.
    """
    fitted = _unit_rows(train, "train")
    applied = _unit_rows(test, "test", columns=fitted.shape[1])
    if not 1 <= n_clusters <= fitted.shape[0]:
        raise ValueError(f"n_clusters must be from 1 to the {fitted.shape[0]} train images, got {n_clusters}")

    def assigned(seed: int) -> NDArray[np.int64]:
        model = KMeans(n_clusters, n_init=n_init, random_state=int(seed)).fit(fitted)
        labels: NDArray[np.int64] = model.predict(applied).astype(np.int64)
        return labels

    runs = on_all_cores(assigned, seeds)
    return np.stack(runs) if runs else np.zeros((0, applied.shape[0]), dtype=np.int64)


def kmeans_metrics(assignments: ArrayLike, labels: ArrayLike, n_clusters: int, n_classes: int) -> dict[str, float]:
    """Compute mean and standard deviation over seeds of :func:`.metrics.clustering_metrics`.

    Args:
        assignments: (S, M) cluster ids, one row per seed, from :func:`kmeans_baseline`.
        labels: (M,) class ids; -1 for no label.
        n_clusters: K.
        n_classes: number of classes.

    Returns:
        ``{"acc_mean", "acc_std", "nmi_mean", ...}``; the standard deviation is that of the sample (divided by S - 1),
        and 0 for one seed.

    Raises:
        ValueError: for wrong shapes or ids.
    """
    rows = as_array(assignments)
    if rows.ndim != 2 or rows.shape[0] == 0:
        raise ValueError(f"assignments must be (seeds, images) with at least one seed, got {rows.shape}")
    per_seed = [clustering_metrics(row, labels, n_clusters, n_classes) for row in rows]
    result: dict[str, float] = {}
    for name in per_seed[0]:
        values = np.array([metrics[name] for metrics in per_seed])
        result[f"{name}_mean"] = float(values.mean())
        result[f"{name}_std"] = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return result


def linear_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    *,
    weight_decay: float = 1e-3,
    max_iterations: int = 200,
) -> float:
    """Compute the test accuracy of a linear classifier (multinomial logistic regression) on frozen features.

    Features are standardised by the train set's mean and standard deviation. Weights start at zero, and the optimiser
    is full-batch L-BFGS in float64, so the result depends only on the input.

    Args:
        train: (N, D) features.
        train_labels: (N,) integers; images with -1 are excluded, here and in the test set.
        test: (M, D) features, on the device of ``train``.
        test_labels: (M,) integers.
        weight_decay: factor of half the squared norm of the weights (not the biases) in the loss.
        max_iterations: maximum number of L-BFGS steps.

    Returns:
        A fraction from 0 to 1.

    Raises:
        ValueError: for wrong shapes or values, or if there are no labels.
    """
    train, train_labels = _with_labels(train, train_labels, "train", "train_labels")
    test, test_labels = _with_labels(test, test_labels, "test", "test_labels")
    if train.shape[1] != test.shape[1]:
        raise ValueError(f"test must have train's {train.shape[1]} features, got {test.shape[1]}")
    classifier = LinearClassifier.fit(train, train_labels, weight_decay=weight_decay, max_iterations=max_iterations)
    return float((classifier(test).argmax(dim=1) == test_labels).double().mean())


@dataclass(frozen=True)
class Standardization:
    """Mean and standard deviation of each feature, (D,) float64; the deviation of a constant feature is infinite."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Standardization:
        """Measure (N, D) features."""
        x = features.double()
        mean, deviation = x.mean(dim=0), x.std(dim=0, correction=0)
        # A constant feature carries no information, and dividing by its rounding error would amplify noise.
        return cls(mean, torch.where(deviation > 1e-9 * (mean.abs() + 1), deviation, torch.inf))

    def __call__(self, features: Tensor) -> Tensor:
        """Return (N, D) float64 standardised features."""
        return (features.double() - self.mean) / self.scale


@dataclass(frozen=True)
class LinearClassifier:
    """Multinomial logistic regression on standardised features.

    Attributes:
        standardization: of the features.
        weight: (C, D) float64.
        bias: (C,) float64.
    """

    standardization: Standardization
    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(
        cls,
        features: Tensor,
        labels: Tensor,
        *,
        weight_decay: float,
        n_classes: int | None = None,
        standardization: Standardization | None = None,
        max_iterations: int = 200,
    ) -> LinearClassifier:
        """Fit a classifier as :func:`linear_probe` does.

        Args:
            features: (N, D), N of at least 1.
            labels: (N,) int64 on the same device, from 0.
            weight_decay: factor of half the squared norm of the weights in the loss.
            n_classes: C; None for as many as the labels show.
            standardization: None for that of ``features``.
            max_iterations: maximum number of L-BFGS steps.

        Raises:
            ValueError: for a negative or infinite ``weight_decay``.
        """
        if not 0 <= weight_decay < float("inf"):
            raise ValueError(f"weight_decay must be finite and not negative, got {weight_decay}")
        standardization = standardization or Standardization.of(features)
        x = standardization(features)
        count = int(labels.max()) + 1 if n_classes is None else n_classes
        weight = x.new_zeros((count, x.shape[1]), requires_grad=True)
        bias = x.new_zeros(count, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=max_iterations, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), labels) + 0.5 * weight_decay * weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        return cls(standardization, weight.detach(), bias.detach())

    def __call__(self, features: Tensor) -> Tensor:
        """Return the (N, C) float64 logits of (N, D) features."""
        return F.linear(self.standardization(features), self.weight, self.bias)


def _with_labels(features: Any, labels: Any, name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    """Return the features that have a label, and the labels, at least one."""
    features, labels = _labelled_only(features, labels, name, labels_name)
    if labels.shape[0] < 1:
        raise ValueError(_NO_LABEL.format(labels_name))
    return features, labels


def _labelled_only(features: Any, labels: Any, name: str, labels_name: str) -> tuple[Tensor, Tensor]:
    features, labels = torch.as_tensor(features), torch.as_tensor(labels)
    if features.ndim != 2 or not features.is_floating_point():
        raise ValueError(f"{name} must be floats of shape (N, D), got {features.dtype} {tuple(features.shape)}")
    if labels.shape != features.shape[:1] or labels.is_floating_point():
        raise ValueError(
            f"{labels_name} must be integers of shape ({features.shape[0]},), got {labels.dtype} {tuple(labels.shape)}"
        )
    labels = labels.to(features.device, torch.int64)
    keep = labels >= 0
    # Features are large: those that all have a label are not copied.
    return (features.detach(), labels) if bool(keep.all()) else (features.detach()[keep], labels[keep])


def _unit_rows(values: ArrayLike | Tensor, name: str, columns: int | None = None) -> NDArray[np.float32]:
    matrix = as_matrix(values, name, columns=columns)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} must be finite, got infinite features")
    norm = np.linalg.norm(matrix, axis=1, keepdims=True)
    return (matrix / np.maximum(norm, 1e-12)).astype(np.float32)
