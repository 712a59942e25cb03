"""The number of groups, suggested by the label-free score and by the agreement of repeated groupings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from ..errors import ConfigError
from ..threads import on_all_cores
from .score import label_free_score
from .space import FeatureSpace
from .ways import WAYS, kmeans

MOST = 100
"""Largest number of groups that is tried by default."""
SMALLEST_GROUP = 10
"""Images of a mean group, at least, in the default range."""
TREES = ("linkage", "ward", "merging")
"""Ways that are tried for every number, besides k-means: their trees are made once and cut for each number."""
SMOOTHING = (10, 2)
"""Neighbours and rounds of the smoothed features that k-means groups."""
SAME_SCORE = 0.002
"""Relative difference of scores that does not count: over a range of numbers the score is often nearly flat."""
SAME_STABILITY = 0.1
"""Difference of stabilities that does not count."""
REPEATS = 3
"""Groupings with other seeds, whose agreement is the stability."""


@dataclass(frozen=True)
class Point:
    """One number of groups that was tried.

    Attributes:
        k: the number of groups.
        score: the best label-free score of a partition into k groups.
        stability: mean adjusted mutual information of groupings from different starts, 1 if they are equal.
        way: the way that gave the best score.
    """

    k: int
    score: float
    stability: float
    way: str


@dataclass(frozen=True)
class Suggestion:
    """A suggested number of groups with the curve that it was read from."""

    k: int
    curve: tuple[Point, ...]

    @property
    def at_the_edge(self) -> bool:
        """True if the suggestion is the smallest or the largest number that was tried."""
        return self.k in (self.curve[0].k, self.curve[-1].k)


def suggest_number(space: FeatureSpace, numbers: Sequence[int] | None = None) -> Suggestion:
    """Suggest how many groups the images fall into.

    For each number, the images are grouped in several ways and the best label-free score counts. Of the numbers whose
    score is within 0.2 percent of the highest, those are left out that are clearly less stable than the others; the
    smallest that remains is the suggestion. First numbers in steps of about a fifth are tried, then all between the
    neighbours of the best.

    Args:
        space: features and neighbours.
        numbers: the numbers to try, each from 2 to N; by default from 2 to a tenth of the images, at most 100.

    Raises:
        ConfigError: if a number is not from 2 to N.
    """
    tried = sorted(set(numbers)) if numbers is not None else default_numbers(len(space))
    wrong = [k for k in tried if not 2 <= k <= len(space)]
    if wrong or not tried:
        raise ConfigError(f"numbers of groups must be from 2 to the {len(space)} images, got {wrong or 'none'}")
    points = _points(space, tried)
    if numbers is None:
        best = tried.index(max(points, key=lambda k: (points[k].score, -k)))
        low, high = tried[max(best - 1, 0)], tried[min(best + 1, len(tried) - 1)]
        points |= _points(space, [k for k in range(low + 1, high) if k not in points])
    curve = tuple(points[k] for k in sorted(points))
    highest = max(point.score for point in curve)
    equal = [point for point in curve if point.score >= highest - SAME_SCORE * abs(highest)]
    steadiest = max(point.stability for point in equal)
    return Suggestion(min(point.k for point in equal if point.stability >= steadiest - SAME_STABILITY), curve)


def default_numbers(n: int) -> list[int]:
    """Return the numbers of groups to try first for n images: from 2 on, in steps of a fifth."""
    most = max(2, min(MOST, n // SMALLEST_GROUP))
    numbers = [2]
    while numbers[-1] < most:
        numbers.append(min(most, max(numbers[-1] + 1, round(numbers[-1] * 1.2))))
    return numbers


def _points(space: FeatureSpace, numbers: Sequence[int]) -> dict[int, Point]:
    return dict(zip(numbers, on_all_cores(lambda k: _point(space, k), numbers), strict=True))


def _point(space: FeatureSpace, k: int) -> Point:
    from sklearn.metrics import adjusted_mutual_info_score

    rows = space.smoothed_reduced(*SMOOTHING)
    repeats = [kmeans(rows, k, space.seed + number, starts=1)[0] for number in range(REPEATS)]
    agreement = np.mean([adjusted_mutual_info_score(a, b) for a, b in combinations(repeats, 2)])
    partitions = [("smoothed-kmeans", labels) for labels in repeats]
    partitions += [(way, partition()) for way in TREES for partition in WAYS[way](space, k).values()]
    scored = [(label_free_score(labels, space).total, way) for way, labels in partitions]
    score, way = max(scored, key=lambda pair: pair[0])
    return Point(k, score, float(agreement), way)
