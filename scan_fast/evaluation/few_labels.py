"""A linear classifier on frozen features that learns from the labels of a few images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..random import permutation, stream_key
from .probes import LinearClassifier, Standardization

WEIGHT_DECAYS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the regularisation that are tried."""

FALLBACK = 1e-2
"""Weight decay if every class has a single labelled image, so that none can be held out to choose by."""

HELD_OUT = 5
"""Of each class with several labelled images, the first and every fifth after it choose the weight decay."""


@dataclass(frozen=True)
class ProbeScore:
    """Accuracy of one classifier on test images.

    Attributes:
        labels: the number of labelled images that it learned from.
        weight_decay: the one that was chosen.
        top1, top5: accuracies; ``top5`` is None for five classes or fewer.
    """

    labels: int
    weight_decay: float
    top1: float
    top5: float | None


def draw_labelled(labels: Tensor, fraction: float, seed: int, draw: int) -> Tensor:
    """Draw a share of the labelled images of each class, at least one of each.

    A draw of a smaller share is a part of the same draw of a larger one.

    Args:
        labels: (N,) int64 classes; -1 for no label.
        fraction: the share, above 0 and at most 1; the number of each class is rounded to the nearest.
        seed: seed of the draws.
        draw: number of the draw.

    Returns:
        (M,) int64 rows in ascending order.

    Raises:
        ValueError: for another fraction, or if no image is labelled.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    order = permutation(stream_key(seed, "few labels"), draw, len(labels))
    shuffled = labels[order]
    chosen = [
        order[members[: max(1, round(fraction * len(members)))]]
        for number in shuffled[shuffled >= 0].unique().tolist()
        for members in [(shuffled == number).nonzero().squeeze(1)]
    ]
    if not chosen:
        raise ValueError("labels must hold at least one label (not -1)")
    return torch.cat(chosen).sort().values


def choose_weight_decay(
    features: Tensor, labels: Tensor, n_classes: int, standardization: Standardization, max_iterations: int = 200
) -> float:
    """Choose the weight decay with the lowest cross-entropy on held-out labelled images.

    Of each class with several images, the first and every fifth after it are held out. Of equal losses the larger
    weight decay is taken.

    Args:
        features: (M, D) features of the labelled images.
        labels: (M,) int64 classes.
        n_classes: number of classes.
        standardization: of the features.
        max_iterations: maximum number of L-BFGS steps of each fit.

    Returns:
        One of :data:`WEIGHT_DECAYS`; :data:`FALLBACK` if nothing can be held out.
    """
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for number in labels.unique().tolist():
        members = (labels == number).nonzero().squeeze(1)
        if len(members) > 1:
            held[members[::HELD_OUT]] = True
    if not bool(held.any()):
        return FALLBACK
    losses = {}
    for decay in sorted(WEIGHT_DECAYS, reverse=True):
        classifier = LinearClassifier.fit(
            features[~held],
            labels[~held],
            weight_decay=decay,
            n_classes=n_classes,
            standardization=standardization,
            max_iterations=max_iterations,
        )
        losses[decay] = float(F.cross_entropy(classifier(features[held]), labels[held]))
    return min(losses, key=lambda decay: losses[decay])


def few_label_probe(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    n_classes: int,
    fraction: float,
    *,
    seed: int = 0,
    draw: int = 0,
    max_iterations: int = 200,
) -> ProbeScore:
    """Measure a linear classifier that learns from the labels of a share of the training images.

    The classifier is that of :func:`.probes.linear_probe`. Features are standardised by all training images, which
    needs no labels. The weight decay is chosen by labelled training images alone (:func:`choose_weight_decay`), and the
    classifier then learns from all of them.

    Args:
        train: (N, D) features.
        train_labels: (N,) int64 classes from 0; images of -1 have no label.
        test: (M, D) features, on the device of ``train``.
        test_labels: (M,) int64; images of -1 are left out.
        n_classes: number of classes.
        fraction: share of the labelled training images of each class, see :func:`draw_labelled`.
        seed: seed of the draws.
        draw: number of the draw.
        max_iterations: maximum number of L-BFGS steps of each fit.

    Raises:
        ValueError: for a wrong fraction, or if no training or no test image is labelled.
    """
    if not bool((test_labels >= 0).any()):
        raise ValueError("test_labels must hold at least one label (not -1)")
    rows = draw_labelled(train_labels.cpu(), fraction, seed, draw).to(train.device)
    features, labels = train[rows], train_labels.to(train.device)[rows]
    standardization = Standardization.of(train)
    decay = choose_weight_decay(features, labels, n_classes, standardization, max_iterations)
    classifier = LinearClassifier.fit(
        features,
        labels,
        weight_decay=decay,
        n_classes=n_classes,
        standardization=standardization,
        max_iterations=max_iterations,
    )
    known = test_labels >= 0
    logits, own = classifier(test[known.to(test.device)]), test_labels[known].to(test.device)
    top1 = float((logits.argmax(dim=1) == own).double().mean())
    top5 = None
    if n_classes > 5:
        top5 = float((logits.topk(5, dim=1).indices == own[:, None]).any(dim=1).double().mean())
    return ProbeScore(len(rows), decay, top1, top5)
