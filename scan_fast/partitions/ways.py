"""The ways to group the images of a feature space into a given number of groups.

Each way is a function of the space and the number of groups that returns partitions by variant. None of them assumes
that the groups are equally large.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .linkage import LARGEST, Tree, average_linkage, cut, ward_linkage
from .score import group_sums
from .space import FeatureSpace, Indices, Rows, drawn_rows, unit_rows

if TYPE_CHECKING:
    import scipy.sparse

Partitions = Mapping[str, Callable[[], Indices]]
"""By variant, a function that returns (N,) int64 group numbers."""

LEAST_SHARE = 0.2
"""Least size of a group that linkage may leave, as a share of N / K."""
MOST_FOR_DENSE = 500
"""Images below which the eigenvectors are those of the full matrix."""
MOST_FOR_SPECTRAL = 20_000
"""Images of which eigenvectors are computed; beyond that they take minutes."""
OVER_CLUSTERED = 40
"""Groups that are made first for up to 4 groups; twice as many for up to 8, and so on."""
LINKS = 20
"""Neighbours of an image in the graph of links."""


def kmeans_partitions(space: FeatureSpace, k: int) -> Partitions:
    """Group by k-means on the features, the best of 10 starts: what most tools do."""
    return {"": lambda: kmeans(space.reduced, k, space.seed, starts=10)[0]}


def smoothed_kmeans_partitions(space: FeatureSpace, k: int) -> Partitions:
    """Group by k-means on features that are averaged over the neighbour graph."""

    def partition(neighbors: int, rounds: int) -> Indices:
        return kmeans(space.smoothed_reduced(neighbors, rounds), k, space.seed, starts=4)[0]

    return _smoothed_variants(partition, (10, 2), (20, 2), (10, 4))


def linkage_partitions(space: FeatureSpace, k: int) -> Partitions:
    """Group by average linkage of cosine similarities, without groups far smaller than the mean.

    It keeps a large group whole that k-means cuts into pieces of the mean size.
    """

    def partition(neighbors: int, rounds: int) -> Indices:
        items, tree = space.kept(("average tree", neighbors, rounds), lambda: _average_tree(space, neighbors, rounds))
        labels = cut(tree, k, LEAST_SHARE * len(space) / k)[items]
        return _filled(labels, space.smoothed(neighbors, rounds))

    return _smoothed_variants(partition, (0, 0), (10, 2), (10, 4), (20, 4))


def ward_partitions(space: FeatureSpace, k: int) -> Partitions:
    """Group by Ward's linkage."""

    def partition(neighbors: int, rounds: int) -> Indices:
        items, tree = space.kept(("ward tree", neighbors, rounds), lambda: _ward_tree(space, neighbors, rounds))
        return cut(tree, k)[items]

    return _smoothed_variants(partition, (0, 0), (10, 2), (10, 4))


def _smoothed_variants(partition: Callable[[int, int], Indices], *smoothings: tuple[int, int]) -> Partitions:
    """Return the variants of a way by the neighbours and rounds of smoothing, (0, 0) for none."""
    return {
        f"{neighbors} neighbors, {rounds} rounds": partial(partition, neighbors, rounds)
        for neighbors, rounds in smoothings
    }


def merging_partitions(space: FeatureSpace, k: int) -> Partitions:
    """Group into 10 to 20 times as many groups and merge those that are linked most by neighbours."""

    many = max(k, min(OVER_CLUSTERED * 2 ** math.ceil(math.log2(max(k, 4) / 4)), len(space) // 8))

    def compute() -> tuple[Indices, Tree]:
        import scipy.sparse

        small = _dense(kmeans(space.smoothed_reduced(10, 1), many, space.seed, starts=1)[0])
        sizes = np.bincount(small).astype(np.float64)
        member = scipy.sparse.csr_matrix((np.ones(len(small)), (np.arange(len(small)), small)))
        links = (member.T @ _links(space) @ member).toarray() / np.outer(sizes, sizes)
        return small, average_linkage(links.astype(np.float32), sizes)

    def partition() -> Indices:
        small, tree = space.kept(("merging tree", many), compute)
        return cut(tree, k)[small]

    return {"": partition}


def spectral_partitions(space: FeatureSpace, k: int) -> Partitions:
    """Group by k-means on the leading eigenvectors of the graph of neighbours (Ng, Jordan and Weiss, NIPS 2001)."""
    n = len(space)
    dense = n < MOST_FOR_DENSE
    if n > MOST_FOR_SPECTRAL or not (dense or k <= n // 4):  # Lanczos needs room for more vectors than it returns
        return {}

    def partition() -> Indices:
        import scipy.sparse
        from scipy.sparse.linalg import eigsh

        links = _links(space)
        scale = scipy.sparse.diags(1 / np.sqrt(np.asarray(links.sum(axis=1)).ravel() + 1e-12))
        scaled = scale @ links @ scale
        if dense:
            vectors = np.linalg.eigh(scaled.toarray())[1][:, -k:]
        else:
            # A start without symmetry: groups without any link to one another share an eigenvalue.
            start = np.random.default_rng(space.seed).standard_normal(n)
            _, vectors = eigsh(scaled, k=k, which="LA", v0=start, maxiter=1000 + 100 * k)
        return kmeans(unit_rows(vectors.astype(np.float32)), k, space.seed, starts=4)[0]

    return {"": partition}


WAYS: dict[str, Callable[[FeatureSpace, int], Partitions]] = {
    "kmeans": kmeans_partitions,
    "smoothed-kmeans": smoothed_kmeans_partitions,
    "linkage": linkage_partitions,
    "ward": ward_partitions,
    "merging": merging_partitions,
    "spectral": spectral_partitions,
}
"""The ways by name."""


def kmeans(rows: Rows, k: int, seed: int, *, starts: int) -> tuple[Indices, Rows]:
    """Return (N,) labels and (K, D) centres of k-means; the same bits for any number of threads.

    Args:
        rows: (N, D) float32.
        k: number of groups.
        seed: seed of the starts and of the rows that it is fitted to, see :func:`.space.drawn_rows`.
        starts: number of starts; the one of least inertia counts.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    if k > len(rows):
        raise ConfigError(f"{k} groups of {len(rows)} images cannot be made; give at most {len(rows)}")
    drawn = drawn_rows(len(rows), seed)
    # k-means++ compares each row with each new centre, which takes longer than all the rest for many centres.
    init = "k-means++" if k <= 500 else "random"
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct images than groups: some stay empty
        model = KMeans(k, init=init, n_init=starts, random_state=seed % 2**32, max_iter=100).fit(rows[drawn])
        labels = model.labels_ if len(drawn) == len(rows) else model.predict(rows)
    return labels.astype(np.int64), model.cluster_centers_.astype(np.float32)


def _items(space: FeatureSpace, neighbors: int, rounds: int) -> Indices:
    """Return the item of each image to link: the image itself, or its small group if there are too many images."""
    if len(space) <= LARGEST:
        return np.arange(len(space))
    labels, _ = kmeans(space.smoothed_reduced(neighbors, rounds), LARGEST // 2, space.seed, starts=1)
    return _dense(labels)


def _dense(labels: Indices) -> Indices:
    """Return the labels numbered from 0 without gaps."""
    numbered: Indices = np.unique(labels, return_inverse=True)[1].astype(np.int64)
    return numbered


def _means(items: Indices, rows: Rows) -> tuple[Rows, NDArray[np.float64]]:
    """Return the mean row and the size of each item."""
    n = int(items.max()) + 1
    sizes = np.bincount(items, minlength=n).astype(np.float64)
    if n == len(rows):
        return rows, sizes
    return (group_sums(items, rows, n) / sizes[:, None]).astype(np.float32), sizes


def _average_tree(space: FeatureSpace, neighbors: int, rounds: int) -> tuple[Indices, Tree]:
    items = _items(space, neighbors, rounds)
    means, sizes = _means(items, space.smoothed(neighbors, rounds))
    return items, average_linkage(means @ means.T, sizes)  # the mean of all products is the product of the means


def _ward_tree(space: FeatureSpace, neighbors: int, rounds: int) -> tuple[Indices, Tree]:
    items = _items(space, neighbors, rounds)
    means, sizes = _means(items, space.smoothed_reduced(neighbors, rounds))
    return items, ward_linkage(means, sizes)


def _links(space: FeatureSpace) -> scipy.sparse.csr_matrix:
    """Return the symmetric (N, N) graph of neighbours, weighted by distance on the scale of both ends.

    The scale of an image is the distance of its seventh neighbour (Zelnik-Manor and Perona, NIPS 2004).
    """

    def compute() -> scipy.sparse.csr_matrix:
        import scipy.sparse

        index = space.neighbors(LINKS)
        squared = np.maximum(2 - 2 * space.similarity[:, : index.shape[1]].astype(np.float64), 0)
        scale = np.sqrt(squared[:, min(6, index.shape[1] - 1)]) + 1e-9
        weight = np.exp(-squared / (scale[:, None] * scale[index]))
        n = len(space)
        rows = np.repeat(np.arange(n), index.shape[1])
        graph = scipy.sparse.csr_matrix((weight.ravel(), (rows, index.ravel())), shape=(n, n))
        return ((graph + graph.T) / 2).tocsr()

    return space.kept("links", compute)


def _filled(labels: Indices, rows: Rows) -> Indices:
    """Give images without a group (-1) that of the most similar group mean."""
    left = np.flatnonzero(labels < 0)
    if len(left):
        k = int(labels.max()) + 1
        means = unit_rows(group_sums(np.where(labels < 0, k, labels), rows, k + 1)[:k].astype(np.float32))
        labels = labels.copy()
        labels[left] = (rows[left] @ means.T).argmax(axis=1)
    return labels
