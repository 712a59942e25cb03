"""Search of a run's images for copies, images that fit nowhere and groups that may be one; and their map."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ..data.decode import open_image
from ..evaluation.pictures import Signature, same_picture
from ..evaluation.projection import project
from ..evaluation.similarity import LinkedGroups, linked_groups, outlier_scores, similar_pairs
from ..neighbors import topk_neighbors
from ..runs import artifacts
from ..runs.findings import DuplicateRow, Duplicates, OutlierRow, Outliers
from ..runs.folder import RunFolder
from ..runs.records import ImageMap, Neighbors
from ..runs.tables import Assignments
from .originals import Originals

NEAREST = 10
LARGEST_SEARCH = 2.5e11
"""Multiplications of a search among all images. A larger one uses the mined neighbours, which are of one split each."""
ALIKE = 0.8
"""The least cosine similarity of copies; the pixels decide."""
OUTLIER = 2.5
"""The least score of an image that fits nowhere."""
ONE_GROUP = 0.3
"""The least density of links between two groups, relative to that inside, to say that they may be one."""


@dataclass(frozen=True)
class Findings:
    """Results of the search, with images by their number in the assignments.

    Attributes:
        duplicates: groups of copies, the best copy of each first; the largest group first.
        exact: the images of which another has the same content.
        outliers: (number, mean similarity, score), the farthest first.
        linked: groups that may be one.
        positions: (N, 2) on the map, or None.
    """

    duplicates: list[list[int]]
    exact: set[int]
    outliers: list[tuple[int, float, float]]
    linked: list[LinkedGroups]
    positions: NDArray[np.float32] | None


def find(
    run: RunFolder,
    table: Assignments,
    embeddings: NDArray[np.float32] | None,
    originals: Originals,
    *,
    with_map: bool,
    thumbnails: dict[int, str] | None = None,
) -> Findings:
    """Search the images and write duplicates.csv, outliers.csv and map.npz.

    Args:
        run: the run folder.
        table: the assignments.
        embeddings: (N, D) unit rows in the order of the assignments; None finds exact copies alone.
        originals: the images.
        with_map: make the map.
        thumbnails: thumbnails that are there, as paths; they are faster to read.
    """
    nearest = _nearest(run, table, embeddings)
    values: dict[tuple[int, int], float] = {}
    outliers: list[tuple[int, float, float]] = []
    linked: list[LinkedGroups] = []
    if nearest is not None:
        index, similarity = nearest
        pairs, alike = similar_pairs(index, similarity, ALIKE)
        values = {(a, b): float(v) for (a, b), v in zip(pairs.tolist(), alike, strict=True)}
        mean, score = outlier_scores(index, similarity)
        order = np.argsort(-score, kind="stable")
        outliers = [(int(i), float(mean[i]), float(score[i])) for i in order[: int((score >= OUTLIER).sum())]]
        linked = linked_groups(index, table.clusters, affinity=ONE_GROUP)
    groups, exact = _copies(originals, list(values), run.path / artifacts.THUMBNAILS, thumbnails or {})
    run.write(artifacts.DUPLICATES, _duplicates_table(table, originals, groups, exact, embeddings))
    rows = [OutlierRow(table.paths[i], int(table.clusters[i]), mean, score) for i, mean, score in outliers]
    run.write(artifacts.OUTLIERS, Outliers(rows))
    positions = _map(run, embeddings) if with_map and embeddings is not None else None
    return Findings(groups, exact, outliers, linked, positions)


def _nearest(
    run: RunFolder, table: Assignments, embeddings: NDArray[np.float32] | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Return for each image the numbers of the nearest others and the similarities; None if nothing is known."""
    if embeddings is None or len(embeddings) < 2:
        return None
    n, dimension = embeddings.shape
    if n * n * dimension <= LARGEST_SEARCH:
        similarity, index = topk_neighbors(torch.from_numpy(embeddings), min(NEAREST, n - 1))
        return index.numpy(), similarity.numpy()
    return _in_order(run.read(artifacts.NEIGHBORS), table) if run.has(artifacts.NEIGHBORS) else None


def _in_order(mined: Neighbors, table: Assignments) -> tuple[NDArray[np.int64], NDArray[np.float32]] | None:
    """Number the mined neighbours as the assignments do."""
    splits = np.array(table.splits)
    k = min((index.shape[1] for index in mined.index.values()), default=0)
    index = np.full((len(splits), k), -1, dtype=np.int64)
    similarity = np.full((len(splits), k), -np.inf, dtype=np.float32)
    for split in dict.fromkeys(table.splits):
        rows = np.flatnonzero(splits == split)
        own = mined.index.get(split)
        if own is None or len(own) != len(rows):
            return None
        own = own[:, :k]
        index[rows] = np.where(own >= 0, rows[np.maximum(own, 0)], -1)
        similarity[rows] = mined.similarity[split][:, :k]
    return index, similarity


def _copies(
    originals: Originals, candidates: Sequence[tuple[int, int]], folder: Path, thumbnails: dict[int, str]
) -> tuple[list[list[int]], set[int]]:
    """Return the groups of copies and the images that have an exact copy."""
    sides: dict[int, Signature | None] = {}

    def signature(number: int) -> Signature | None:
        if number not in sides:
            picture = _small(number, originals, folder, thumbnails)
            sides[number] = None if picture is None else Signature(picture)
        return sides[number]

    digests: dict[int, bytes | None] = {}

    def digest(number: int) -> bytes | None:
        if number not in digests:
            digests[number] = originals.digest(number)
        return digests[number]

    joined = _Union(len(originals))
    exact: set[int] = set()
    by_size: dict[int, list[int]] = defaultdict(list)
    for number in range(len(originals)):
        if size := originals.n_bytes(number):
            by_size[size].append(number)
    for equal in by_size.values():
        by_digest: dict[bytes, list[int]] = defaultdict(list)
        for number in equal if len(equal) > 1 else ():
            if (found := digest(number)) is not None:
                by_digest[found].append(number)
        for copies in by_digest.values():
            if len(copies) > 1:
                exact.update(copies)
                for other in copies[1:]:
                    joined.join(copies[0], other)
    for a, b in candidates:
        if joined.root(a) == joined.root(b):
            continue
        # Files of other sizes have other contents; images without a file of their own have no size.
        if not originals.n_bytes(a) and not originals.n_bytes(b) and digest(a) is not None and digest(a) == digest(b):
            exact.update((a, b))
            joined.join(a, b)
            continue
        first, second = signature(a), signature(b)
        if first is not None and second is not None and same_picture(first, second):
            joined.join(a, b)
    groups = [
        sorted(group, key=lambda i: (-_pixels(originals, i), -originals.n_bytes(i), i)) for group in joined.groups()
    ]
    return sorted(groups, key=lambda group: (-len(group), group[0])), exact


def _pixels(originals: Originals, number: int) -> int:
    width, height = originals.size(number)
    return width * height


def _small(number: int, originals: Originals, folder: Path, thumbnails: dict[int, str]) -> Image.Image | None:
    """Return a picture at the size of a thumbnail. What is smaller than one is read from the original."""
    name = thumbnails.get(number)
    if name is not None and name.endswith(".jpg"):
        try:
            with open_image(folder / name) as picture:
                return picture.convert("RGB")
        except Exception:  # a file that was put in its place may be anything
            pass
    return originals.picture(number, 192)


def _duplicates_table(
    table: Assignments,
    originals: Originals,
    groups: Sequence[Sequence[int]],
    exact: set[int],
    embeddings: NDArray[np.float32] | None,
) -> Duplicates:
    rows = []
    for number, group in enumerate(groups):
        best = group[0]
        for i in group:
            similarity = (
                1.0 if i == best else float("nan") if embeddings is None else float(embeddings[i] @ embeddings[best])
            )
            width, height = originals.size(i)
            kind = "exact" if i in exact else "near"
            mark = "best" if i == best else ""
            rows.append(
                DuplicateRow(number, table.paths[i], kind, similarity, originals.n_bytes(i), width, height, mark)  # type: ignore[arg-type]
            )
    return Duplicates(rows)


def _map(run: RunFolder, embeddings: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the map of these embeddings, from map.npz if it has one."""
    digest = hashlib.blake2b(np.ascontiguousarray(embeddings).tobytes(), digest_size=16).hexdigest()
    if run.has(artifacts.MAP):
        known = run.read(artifacts.MAP)
        if known.digest == digest:
            return known.positions
    positions = project(embeddings)
    run.write(artifacts.MAP, ImageMap(positions, digest))
    return positions


class _Union:
    """Sets of numbers that are joined pair by pair."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))
        self._touched: set[int] = set()

    def root(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        self._touched.update((a, b))
        self._parent[self.root(a)] = self.root(b)

    def groups(self) -> list[list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for number in sorted(self._touched):
            found[self.root(number)].append(number)
        return list(found.values())
