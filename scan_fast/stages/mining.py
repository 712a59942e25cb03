"""Mining: the nearest neighbours of every image in the space that stage one learned."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .. import distributed
from ..data.neighbor_files import read_neighbors
from ..errors import ConfigError, DataError, MissingPackageError, RunError
from ..evaluation.metrics import PURITY_AT, neighbor_purity, purity_at
from ..models.weight_files import file_digest
from ..neighbors import topk_neighbors
from ..ops.sharded_neighbors import sharded_topk_neighbors
from ..runs import artifacts
from ..runs.records import FILES, Embeddings, Neighbors
from ..training.context import Context
from .embedding import row_counts, rows_of, unit_embedding
from .handover import Handover
from .inputs import mined_neighbors, mined_rows, pretext_model
from .stored import features_key

NAME = "mining"


def run_mining(context: Context, handover: Handover) -> None:
    """Write embeddings.npz (unit rows) and neighbors.npz (indices without the image itself), each split apart.

    With several ranks, each embeds its share of the images and searches the neighbours of these: its rows stay, and the
    rows of the others pass by (:mod:`scan_fast.ops.sharded_neighbors`). Rank 0 collects what is written.
    """
    begin = time.perf_counter()
    config = context.config.mining
    model = pretext_model(context)
    embeddings: dict[str, np.ndarray] = {}
    found = Neighbors({}, {}, context.run.images_digest)
    results: dict[str, Any] = {}
    for split, source in context.clustered.items():
        k = _kept(context, split)
        embedding = unit_embedding(context, model, split, handover)
        if split == "train" and _all_the_same(embedding):
            raise RunError(
                f"all {len(source)} images have the same {config.features} features, so that there is nothing to "
                "group: the pretext stage has not learned to tell them apart; lower pretext.optimizer.lr, and repeat "
                f"it with scan-fast pretext {context.run.path} --again"
            )
        mined = _mined(context, split, embedding, results)
        if mined is None:
            continue  # rank 0 has them
        rows, similarity, index = mined
        embeddings[split] = rows.numpy()
        found.index[split], found.similarity[split] = index[:, :k].numpy(), similarity[:, :k].numpy()
        if source.labels is not None:
            note_purity(results, split, found.index[split], index.numpy(), source.labels)
    key = distributed.on_first(lambda: features_key(context))
    context.run.write(artifacts.EMBEDDINGS, Embeddings(embeddings, key, context.run.images_digest))
    context.run.write(artifacts.NEIGHBORS, found)
    seconds = time.perf_counter() - begin
    context.run.drop_metrics(NAME, 0)  # of a process that was killed between this line and the next two
    context.tracker.record(NAME, 1, 1, {key: value for key, value in results.items() if isinstance(value, float)})
    context.run.finish_stage(NAME, seconds, results, context.config.seed)


def _mined(
    context: Context, split: str, embedding: Tensor, results: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return all rows, similarities and indices of a split on the CPU of rank 0, None on the others."""
    k, kind, file = _kept(context, split), _images(context, split), _file_of(context, split)
    counts, total = row_counts(context, split), len(context.clustered[split])
    if file is None:
        context.tracker.say(f"{NAME}: searching the {k} nearest of each of {total:,} {kind}")
        wanted = k if context.clustered[split].labels is None else _searched(k, total)
        found = search_shares(embedding, wanted, context.config.mining.backend, counts)
        rows, similarity, index = (distributed.rows_on_first(part, counts) for part in (embedding, *found))
        return None if rows is None or similarity is None or index is None else (rows, similarity, index)
    context.tracker.say(f"{NAME}: the {k} nearest of each of {total:,} {kind} are those of {file}")
    given = distributed.on_first(lambda: read_given(context, split, file))
    results.setdefault(FILES, {})[str(file)] = distributed.on_first(lambda: file_digest(file))
    rows = distributed.rows_on_first(embedding, counts)
    if rows is None:
        return None
    return rows, similarities(rows.to(embedding.device), given.to(embedding.device)).cpu(), given


def _all_the_same(embedding: Tensor) -> bool:
    """Return whether the rows of all ranks are equal, up to rounding."""
    first = distributed.agreed(embedding[0].cpu() if len(embedding) else None)
    if first is None:
        return False
    furthest = (embedding - first.to(embedding.device)).abs().max() if len(embedding) else embedding.new_zeros(())
    return max(distributed.gathered(float(furthest))) < 1e-6


def _searched(kept: int, n_images: int) -> int:
    return min(max(kept, *PURITY_AT), n_images - 1)


def note_purity(results: dict[str, Any], split: str, kept: ArrayLike, searched: ArrayLike, labels: Tensor) -> None:
    """Enter the purity of a split's neighbours into the results of mining.

    Args:
        results: gets ``purity`` (``test_purity`` of the test images) of the neighbours that are kept, and in
            ``purity_at`` by split and k (as text, for JSON) that of the k nearest.
        split: "train" or "test".
        kept: (N, k) the neighbours that the later stages use, without the image itself.
        searched: (N, K) more of them, most similar first.
        labels: (N,) int64 classes, -1 for none.
    """
    results["purity" if split == "train" else "test_purity"] = neighbor_purity(kept, labels)
    by_k = {str(k): value for k, value in purity_at(searched, labels).items()}
    results["purity_at"] = {**results.get("purity_at", {}), split: by_k}


def measure_purity(context: Context, results: dict[str, Any]) -> None:
    """Measure the purity of the mined neighbours of a finished run again; see :func:`note_purity`."""
    mined = mined_neighbors(context)
    rows = mined_rows(context)
    for split, source in context.clustered.items():
        if source.labels is not None:
            index = mined[split]
            if _file_of(context, split) is None:
                embedding = torch.from_numpy(rows[split][rows_of(context, split)]).to(context.device)
                wanted, counts = _searched(index.shape[1], len(source)), row_counts(context, split)
                _, own = search_shares(embedding, wanted, context.config.mining.backend, counts)
                index = distributed.all_rows(own, counts)
            note_purity(results, split, mined[split], index.cpu().numpy(), source.labels)


def say_purity(context: Context, results: dict[str, Any]) -> None:
    """Print what :func:`note_purity` has entered in ``purity_at``, if anything."""
    for split, by_k in results.get("purity_at", {}).items():
        listed = ", ".join(f"{value:.4f} at k = {k}" for k, value in by_k.items())
        context.tracker.say(f"{NAME}: purity of the nearest neighbours of {_images(context, split)}: {listed}")


def _file_of(context: Context, split: str) -> Path | None:
    """Return the file of a split's neighbours, None if they are searched.

    Raises:
        ConfigError: for a second file if there is no test split.
    """
    files = context.config.mining.files or ()
    if len(files) > len(context.clustered):
        raise ConfigError(f"mining.files names {files[1]} for test images, but all images are training images")
    at = list(context.clustered).index(split)
    return files[at] if at < len(files) else None


def _kept(context: Context, split: str) -> int:
    """Return the number of neighbours of each image that the later stages get."""
    config = context.config.mining
    return min(config.k if split == "train" else config.test_k, len(context.clustered[split]) - 1)


def _images(context: Context, split: str) -> str:
    return "images" if context.splits.test is None else f"{split} images"


def check_files(context: Context) -> None:
    """Read the files of ``mining.files``, to refuse a wrong one before anything is computed.

    Raises:
        ConfigError: for a second file if there is no test split.
        DataError: as :func:`read_given`.
    """
    for split in context.clustered:
        if (file := _file_of(context, split)) is not None:
            read_given(context, split, file)


def read_given(context: Context, split: str, file: Path) -> Tensor:
    """Return the neighbours of a split in a file of the reference project, as many as ``mining`` asks for.

    Args:
        context: the run.
        split: "train" or "test".
        file: see :func:`scan_fast.data.neighbor_files.read_neighbors`.

    Returns:
        (N, k) int64 on the CPU; -1 for none.

    Raises:
        DataError: if the file cannot be used for these images, or has fewer neighbours.
    """
    found = read_neighbors(file, len(context.clustered[split]), _images(context, split))
    k, n, setting = _kept(context, split), found.shape[1], "k" if split == "train" else "test_k"
    if n < k:
        raise DataError(f"{file} has {n} neighbours of each image, mining.{setting} is {k}; set mining.{setting}={n}")
    return torch.from_numpy(found[:, :k])


@torch.no_grad()
def similarities(embedding: Tensor, index: Tensor) -> Tensor:
    """Return the cosine similarity of each image to given others, (N, k) float32; -inf for none.

    Args:
        embedding: (N, D) float32 unit rows.
        index: (N, k) int64 rows of ``embedding`` on the same device, -1 for none.
    """
    similarity = torch.empty(index.shape, device=embedding.device)
    for rows in torch.arange(len(index), device=embedding.device).split(4096):
        others = embedding[index[rows].clamp_min(0)]
        similarity[rows] = torch.einsum("nd,nkd->nk", embedding[rows], others)
    return similarity.masked_fill(index < 0, -torch.inf)


def search_shares(embedding: Tensor, k: int, backend: str, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return what :func:`search` does for the rows of this rank, (n, k) each; indices are of the rows of all ranks.

    Args:
        embedding: (n, D) rows of this rank.
        k: neighbours of each.
        backend: as in :func:`search`; ``faiss`` runs on rank 0, with the rows of all.
        counts: number of rows of each rank.
    """
    if not distributed.several():
        return search(embedding, k, backend)
    if backend != "faiss":
        return sharded_topk_neighbors(embedding, k, impl=backend)
    rows = distributed.rows_on_first(embedding, counts)

    def on_rank_0() -> tuple[Tensor, Tensor]:
        assert rows is not None
        return search(rows, k, backend)

    similarity, index = distributed.on_first(on_rank_0)
    begin = sum(counts[: distributed.current().rank])
    own = slice(begin, begin + len(embedding))
    return similarity[own].to(embedding.device), index[own].to(embedding.device)


def search(embedding: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Return similarity and index, (N, k) each, by the chosen backend; each excludes the image itself by index.

    Raises:
        MissingPackageError: if the backend's package is not installed.
        UsageError: if ``backend`` is "native" and there is no compiled kernel for the device.
    """
    if backend != "faiss":
        return topk_neighbors(embedding, k, impl=backend)  # type: ignore[arg-type]
    try:
        import faiss
    except ImportError as error:
        raise MissingPackageError(
            "mining.backend=faiss needs the package faiss-cpu or faiss-gpu: pip install faiss-cpu"
        ) from error
    rows = embedding.cpu().numpy()
    index = faiss.IndexFlatIP(rows.shape[1])
    if hasattr(faiss, "index_cpu_to_all_gpus") and faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_all_gpus(index)
    index.add(rows)
    similarity, found = (torch.from_numpy(array) for array in index.search(rows, k + 1))
    # The image itself is usually first, but a duplicate may come before it, or push it out altogether.
    keep = found != torch.arange(len(rows))[:, None]
    keep[keep.all(dim=1), k] = False
    return similarity[keep].view(-1, k), found[keep].view(-1, k)
