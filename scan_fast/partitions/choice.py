"""The choice of a partition: all ways are tried, and the label-free score decides."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..objectives import ObjectiveSettings
from ..threads import on_all_cores
from .heads import REFINEMENTS, train_heads
from .probe import LinearHead, fit_head, nearest_mean_head
from .score import Score, label_free_score
from .space import FeatureSpace, Indices
from .ways import WAYS

KMEANS = "kmeans"
REFINED_NEIGHBORS = 10
"""Neighbours of an image with which heads are trained."""


@dataclass(frozen=True)
class Candidate:
    """A partition of all images.

    Attributes:
        way: name of the way, see :data:`.ways.WAYS`.
        variant: its variant, empty if there is one only.
        labels: (N,) int64 group of each image, from 0.
        score: the label-free score.
        seconds: time that it took.
    """

    way: str
    variant: str
    labels: Indices
    score: Score
    seconds: float

    @property
    def name(self) -> str:
        """The way with its variant."""
        return f"{self.way} ({self.variant})" if self.variant else self.way

    @property
    def groups(self) -> int:
        """Number of groups that have an image."""
        return len(np.unique(self.labels))


@dataclass(frozen=True)
class Choice:
    """The candidates for one number of groups, the best first."""

    candidates: tuple[Candidate, ...]

    @property
    def best(self) -> Candidate:
        """The candidate of the highest score; k-means if another one is only equal."""
        return self.candidates[0]

    @property
    def kmeans(self) -> Candidate:
        """The candidate of k-means."""
        return next(candidate for candidate in self.candidates if candidate.way == KMEANS)

    @property
    def reason(self) -> str:
        """One sentence that says why."""
        best, plain = self.best, self.kmeans
        text = (
            f"{best.name} has the best score of {len(self.candidates)} partitions: {best.score.total:.3f} "
            f"(neighbors in the same group above chance {best.score.consistency:.3f}, "
            f"separation {best.score.separation:.3f})"
        )
        return text if plain is best else f"{text}; plain k-means has {plain.score.total:.3f}"


def choose(space: FeatureSpace, k: int, ways: Sequence[str] = tuple(WAYS), further: Sequence[Candidate] = ()) -> Choice:
    """Group the images in all ways and order the partitions by score.

    k-means is always among them, so the best is never worse than k-means by the score.

    Args:
        space: features and neighbours.
        k: number of groups, from 2 to the number of images.
        ways: names of ways.
        further: candidates that were made elsewhere.
    """
    tasks: list[tuple[str, str, Callable[[], Indices]]] = [
        (way, variant, partition)
        for way in dict.fromkeys((KMEANS, *ways))
        for variant, partition in WAYS[way](space, k).items()
    ]
    candidates = on_all_cores(lambda task: _candidate(space, *task), tasks)
    ordered = sorted([*candidates, *further], key=lambda c: (-c.score.total, c.way != KMEANS))
    return Choice(tuple(ordered))


def refined(
    choice: Choice,
    space: FeatureSpace,
    k: int,
    refinements: Mapping[str, ObjectiveSettings] = REFINEMENTS,
    heads: int = 3,
) -> tuple[LinearHead, Candidate, tuple[Candidate, ...]]:
    """Train heads from the best candidate and return the best of them.

    The heads of each objective start from the best partition and are compared by score with each other, not with the
    partition: a partition that was cut out of the neighbour graph scores higher than it is worth. If no head scores as
    high as k-means, or there is no objective, the result is that of :func:`with_head`.

    Args:
        choice: the candidates.
        space: features and neighbours.
        k: number of groups.
        refinements: what the heads minimise, by name.
        heads: heads of each objective, each from another random weighting of the images.

    Returns:
        The head, the candidate with its labels and score, and the candidates of all heads, the best first.
    """
    features, neighbors = torch.from_numpy(space.unit), torch.from_numpy(space.neighbors(REFINED_NEIGHBORS))
    start = torch.from_numpy(choice.best.labels)
    found: list[tuple[Candidate, LinearHead]] = []
    for name, objective in refinements.items():
        begin = time.perf_counter()
        trained = train_heads(features, neighbors, objective, n_clusters=k, seed=space.seed, heads=heads, start=start)
        seconds = (time.perf_counter() - begin) / heads
        for number in range(heads):
            labels = trained.logits[number].argmax(dim=1).numpy()
            variant = f"from {choice.best.name}, head {number}"
            candidate = Candidate(name, variant, labels, label_free_score(labels, space), seconds)
            found.append((candidate, LinearHead(trained.weight[number], trained.bias[number])))
    found.sort(key=lambda pair: -pair[0].score.total)
    candidates = tuple(candidate for candidate, _ in found)
    if found and found[0][0].score.total >= choice.kmeans.score.total:
        return found[0][1], candidates[0], candidates
    return *with_head(choice, space, k), candidates


def with_head(choice: Choice, space: FeatureSpace, k: int) -> tuple[LinearHead, Candidate]:
    """Return the best candidate with a head that assigns the images as it does, but for single images.

    The head's own partition is scored. If it scores less than k-means, the next candidate is taken, and k-means at
    last, whose centres are a head already.

    Args:
        choice: the candidates.
        space: features and neighbours.
        k: number of groups.

    Returns:
        The head, and the candidate with the labels and the score of the head.
    """
    plain = choice.kmeans
    for candidate in choice.candidates:
        if candidate.score.total < plain.score.total or candidate is plain:
            break
        head = fit_head(candidate.labels, space.unit, k, space.seed)
        labels = head.logits(space.unit).argmax(dim=1).numpy()
        score = label_free_score(labels, space)
        if score.total >= plain.score.total:
            return head, replace(candidate, labels=labels, score=score)
    head = nearest_mean_head(plain.labels, space.unit, k)
    labels = head.logits(space.unit).argmax(dim=1).numpy()
    return head, replace(plain, labels=labels, score=label_free_score(labels, space))


def _candidate(space: FeatureSpace, way: str, variant: str, partition: Callable[[], Indices]) -> Candidate:
    begin = time.perf_counter()
    labels = partition()
    seconds = time.perf_counter() - begin
    return Candidate(way, variant, labels, label_free_score(labels, space), seconds)
