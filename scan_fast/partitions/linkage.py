"""Agglomerative clustering from a matrix of similarities between weighted items, and cuts that leave no tiny group."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .space import Indices, Rows

LARGEST = 6000
"""Items that are linked; their matrix takes 144 MB."""


Update = Callable[[Rows, Rows, float, float, NDArray[np.float64], float], NDArray[np.float64]]
"""Returns the similarities (M,) of two merged groups to all others: of their rows, sizes, all sizes, and similarity."""


@dataclass(frozen=True)
class Tree:
    """The merges of M items, from the most similar pair on.

    Attributes:
        pairs: (M - 1, 2) numbers of the merged nodes: items from 0 to M - 1, then the results of merges in order.
        sizes: (M - 1,) weight of each result.
        leaves: (M,) weight of each item.
    """

    pairs: Indices
    sizes: NDArray[np.float64]
    leaves: NDArray[np.float64]


def average_linkage(similarity: Rows, weights: NDArray[np.float64]) -> Tree:
    """Link items by the mean similarity between the members of two groups (UPGMA), by chains of nearest neighbours.

    Args:
        similarity: (M, M) float32, symmetric; overwritten.
        weights: (M,) number of members of each item.
    """
    return _link(similarity, weights, _average)


def ward_linkage(centers: Rows, weights: NDArray[np.float64]) -> Tree:
    """Link items so that the variance within groups grows least (Ward 1963).

    Args:
        centers: (M, D) float32 means of the items.
        weights: (M,) number of members of each item.
    """
    squares = (centers.astype(np.float64) ** 2).sum(axis=1)
    distance = squares[:, None] + squares[None, :] - 2 * (centers @ centers.T)
    share = weights[:, None] * weights[None, :] / (weights[:, None] + weights[None, :])
    return _link((-np.maximum(distance, 0) * share).astype(np.float32), weights, _ward)


def _average(
    first: Rows, second: Rows, n1: float, n2: float, sizes: NDArray[np.float64], between: float
) -> NDArray[np.float64]:
    mixed: NDArray[np.float64] = (n1 * first + n2 * second) / (n1 + n2)
    return mixed


def _ward(
    first: Rows, second: Rows, n1: float, n2: float, sizes: NDArray[np.float64], between: float
) -> NDArray[np.float64]:
    # Lance and Williams 1967, with negative distances.
    mixed: NDArray[np.float64] = ((n1 + sizes) * first + (n2 + sizes) * second - sizes * between) / (n1 + n2 + sizes)
    return mixed


def _link(similarity: Rows, weights: NDArray[np.float64], update: Update) -> Tree:
    m = len(weights)
    sizes = weights.astype(np.float64).copy()
    np.fill_diagonal(similarity, -np.inf)
    names = np.arange(m)  # the node that each row stands for, in the order in which the chains found the merges
    found: list[tuple[float, int, int]] = []
    chain: list[int] = []
    alive = np.ones(m, dtype=bool)
    for _ in range(m - 1):
        if not chain:
            chain.append(int(np.flatnonzero(alive)[0]))
        while True:
            row = similarity[chain[-1]]
            nearest = int(row.argmax())
            # Equal similarities end at the predecessor, so that the chain cannot run in a circle.
            if len(chain) > 1 and row[chain[-2]] >= row[nearest]:
                break
            chain.append(nearest)
        b, a = chain.pop(), chain.pop()
        a, b = min(a, b), max(a, b)
        between = float(similarity[a, b])
        found.append((between, int(names[a]), int(names[b])))
        mixed = update(similarity[a], similarity[b], sizes[a], sizes[b], sizes, between)
        alive[b] = False
        mixed[~alive] = -np.inf
        mixed[a] = -np.inf
        similarity[a] = similarity[:, a] = mixed
        similarity[b] = similarity[:, b] = -np.inf
        sizes[a] += sizes[b]
        names[a] = m + len(found) - 1
    return _sorted(found, weights)


def _sorted(found: list[tuple[float, int, int]], weights: NDArray[np.float64]) -> Tree:
    """Put the merges in falling order of similarity: chains find them in another one."""
    m = len(weights)
    order = sorted(range(len(found)), key=lambda number: (-found[number][0], number))
    # Rounding may put a merge before one that it builds on; parents must come after their children.
    place = np.empty(len(found), dtype=np.int64)
    done = 0
    placed = np.zeros(len(found), dtype=bool)
    final: list[int] = []
    for start in order:
        stack = [start]
        while stack:
            number = stack[-1]
            if placed[number]:
                stack.pop()
                continue
            open_children = [child - m for child in found[number][1:] if child >= m and not placed[child - m]]
            if open_children:
                stack.extend(open_children)
                continue
            placed[number] = True
            place[number] = done
            done += 1
            final.append(number)
            stack.pop()
    pairs = np.empty((len(found), 2), dtype=np.int64)
    sizes = np.empty(len(found))
    node_size = np.concatenate([weights.astype(np.float64), np.zeros(len(found))])
    for new, number in enumerate(final):
        a, b = (child if child < m else m + int(place[child - m]) for child in found[number][1:])
        pairs[new] = a, b
        sizes[new] = node_size[a] + node_size[b]
        node_size[m + new] = sizes[new]
    return Tree(pairs, sizes, weights.astype(np.float64))


def cut(tree: Tree, groups: int, least: float = 0.0) -> Indices:
    """Cut a tree so that ``groups`` groups have at least the weight ``least``.

    Plain cuts leave each outlier as a group. Here the cut is as high as it can be with so many groups of the
    least weight; smaller groups are left out. If no cut has enough, the least weight is halved.

    Args:
        tree: merges of M items.
        groups: number of groups; M if it is more.
        least: least weight of a group.

    Returns:
        (M,) group of each item from 0, the heaviest first; -1 if it is in none.
    """
    m = len(tree.leaves)
    groups = min(groups, m)
    weight = np.concatenate([tree.leaves, tree.sizes])
    large = weight >= least
    change = large[m:].astype(np.int64) - large[tree.pairs[:, 0]] - large[tree.pairs[:, 1]]
    counts = np.concatenate([[large[:m].sum()], large[:m].sum() + np.cumsum(change)])
    enough = np.flatnonzero(counts >= groups)
    if not len(enough):
        return cut(tree, groups, least / 2)
    merges = int(enough[-1])
    parent = np.arange(2 * m - 1)
    parent[tree.pairs[:merges].ravel()] = np.repeat(m + np.arange(merges), 2)
    root = parent.copy()
    for node in range(m + merges - 1, -1, -1):
        root[node] = root[parent[node]]
    nodes, labels = np.unique(root[:m], return_inverse=True)
    heaviest = np.argsort(-weight[nodes], kind="stable")[:groups]
    number = np.full(len(nodes), -1, dtype=np.int64)
    number[heaviest] = np.arange(len(heaviest))
    result: Indices = number[labels]
    return result
