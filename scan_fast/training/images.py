"""The images of a run: noted at its start, so that it does not continue on others, and the same on all ranks."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import distributed
from ..data import encoded
from ..data.agreement import check_same, raise_first
from ..data.encoded import IdentityKind
from ..data.sources import Source, SubsetSource, TensorSource, take_rows
from ..errors import DataError, RunError
from ..random import permutation, stream_key
from ..runs import artifacts
from ..runs.folder import RunFolder
from ..runs.images import ImageRecord, differences, relabelled


def image_record(sources: Mapping[str, Source], kind: IdentityKind) -> ImageRecord:
    """Return what identifies images.

    Args:
        sources: the images by split.
        kind: what the fingerprints of files are made of; those of arrays are of their pixels.
    """
    marks, stamps, mtimes, labels = [], [], [], []
    names: list[str] = []
    for source in sources.values():
        n, files = len(source), source.files
        names += source.paths
        marks.append(_pixel_digests(source) if files is None else _of_kind(source, kind))
        stamps.append(np.full((n, 4), -1) if files is None else files.stamps)
        mtimes.append(np.full(n, -1) if files is None else files.mtimes)
        labels.append(np.full(n, -1) if source.labels is None else source.labels.numpy())
    first = next(iter(sources.values()))
    return ImageRecord(
        names,
        np.concatenate(marks),
        kind,
        np.concatenate(stamps),
        np.concatenate(mtimes),
        {split: len(source) for split, source in sources.items()},
        np.concatenate(labels).astype(np.int64),
        first.class_names or [],
    )


def _of_kind(source: Source, kind: IdentityKind) -> NDArray[np.uint64]:
    """Return the fingerprints of files; those of another kind than the files' own are computed now."""
    assert source.files is not None
    if source.files.identity == kind:
        return source.files.fingerprints
    return distributed.on_first(lambda: _fingerprints_again(source, range(len(source)), kind))


def check_images(run: RunFolder, sources: Mapping[str, Source], kind: IdentityKind) -> ImageRecord:
    """Note the images of a run that has no results yet; refuse to continue one on other images or other labels.

    With several ranks, all must call this.

    Args:
        run: the run folder.
        sources: all images by split, in the order of the run.
        kind: what identifies files, see ``data.identity``. A run that began with the other kind is compared by that one
            and goes on with this.

    Returns:
        The images as they are now.

    Raises:
        RunError: if an image is gone, new, or has changed since the run began, or has another label. The message names
            it.
    """
    now = image_record(sources, kind)
    run.images = run.images_digest = None
    begun, summary = run.has_results(), run.summary()
    then = run.read(artifacts.IMAGES) if begun and run.has(artifacts.IMAGES) else None
    if then is not None:
        compared = now if then.kind == kind else image_record(sources, then.kind)
        compare(run, then, compared, sources)
        if (label := relabelled(then, compared)) is not None:
            raise RunError(
                f"{run.path} holds a run on other labels: {label}. Undo this, and the same command continues; or "
                "choose another folder for a new run"
            )
        now = replace(now, began="" if then.run_digest == now.digest else then.run_digest)
    elif begun and summary.images is not None and summary.images != now.facts:
        raise RunError(
            f"{run.path} has no {artifacts.IMAGES.name}, and its {summary.images.get('count')} images had another "
            f"digest than these {len(now.names)}: choose another folder for a new run"
        )
    # New stamps alone are no reason to write into a finished run.
    kept = then is not None and (run.has(artifacts.ASSIGNMENTS) or bool(np.array_equal(then.stamps, now.stamps)))
    if then is None or not kept or (then.kind, then.began) != (now.kind, now.began):
        run.write(artifacts.IMAGES, now)
    run.images, run.images_digest = now.facts, now.run_digest
    if then is not None and summary.stages and summary.images != run.images:
        summary.images = run.images
        run.write(artifacts.SUMMARY, summary)
    return now


def compare(
    run: RunFolder, then: ImageRecord, now: ImageRecord, sources: Mapping[str, Source], *, some: bool = False
) -> None:
    """Refuse other images than those of a record.

    Args:
        run: the run, for the message.
        then: the images as the run began.
        now: the images as they are, with fingerprints of the same kind.
        sources: they have the reasons why images cannot be read.
        some: images may be gone and new ones may have come.

    Raises:
        RunError: names the first images that differ.
    """
    skipped = dict(entry for source in sources.values() for entry in source.skipped)
    found = list(differences(then, now, skipped, some=some))
    if not some and not found and (then.names, then.splits) != (now.names, now.splits):
        found = ["their order or their split has changed"]
    if not found:
        return
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise RunError(
        f"{run.path} holds a run on other images: {', '.join(found[:3])}{more}. "
        "Undo this, and the same command continues; or choose another folder for a new run"
    )


def check_shown(run: RunFolder, sources: Mapping[str, Source], kind: IdentityKind) -> None:
    """Refuse to show a run's images if some are not those that it has grouped; images may be gone or new.

    Args:
        run: the run folder.
        sources: the images that are clustered, by split.
        kind: as in :func:`check_images`.

    Raises:
        RunError: names the first images that have changed.
    """
    if not run.has(artifacts.IMAGES):
        return
    then = run.read(artifacts.IMAGES)
    now = image_record({split: source for split, source in sources.items() if split in then.splits}, then.kind)
    compare(run, then, now, sources, some=True)


def check_ranks_agree(sources: Iterable[Source | None]) -> None:
    """Refuse to train on ranks that do not see the same images; all ranks must call this.

    Compared are the number and the names of the images, their labels, the names of the classes, and what is in them: of
    encoded images a sample that every rank reads again, of arrays all pixels.

    Args:
        sources: the images, in the same order on all ranks; None for a split that there is not.

    Raises:
        DataError: on all ranks. The message names the first image that differs, and the ranks with their machines.
    """
    if not distributed.several():
        return
    for source in sources:
        if source is None:
            continue
        check_same(source.paths, "images")
        check_same(source.class_names or [], "classes")
        labels = np.full(len(source), -1) if source.labels is None else source.labels.numpy()
        _compare_ranks(source, range(len(source)), labels, "another label")
        if source.files is None:
            _compare_ranks(source, range(len(source)), _pixel_digests(source), "other pixels")
        else:
            rows = permutation(stream_key(0, "agreement"), 0, len(source))[:_SAMPLE].sort().values.tolist()
            _compare_ranks(source, rows, _fingerprints_again(source, rows, source.files.identity), "another file")


_SAMPLE = 64
"""Encoded images that every rank reads to compare them."""


def _compare_ranks(source: Source, rows: Sequence[int], values: NDArray[np.generic], differs: str) -> None:
    """Compare a value of each of some rows between ranks."""
    digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=8).digest()
    if len(set(distributed.gathered(digest))) == 1:
        return
    first = distributed.agreed(values)
    other = np.flatnonzero(first != values)
    found = distributed.gathered((int(other[0]) if len(other) else len(rows), socket.gethostname()))
    place, rank = min((place, rank) for rank, (place, _) in enumerate(found))
    raise DataError(
        f"the ranks see different images: {source.paths[rows[place]]} has {differs} on rank {rank} ({found[rank][1]}) "
        f"than on rank 0 ({found[0][1]}); give all machines the same images"
    )


def _fingerprints_again(source: Source, rows: Sequence[int], kind: IdentityKind) -> NDArray[np.uint64]:
    """Compute the fingerprints of some encoded images from what this rank reads."""
    assert source.files is not None
    problem = None
    found = np.zeros(len(rows), dtype=np.uint64)
    for place, row in enumerate(rows):
        try:
            found[place] = encoded.fingerprint(source.files.images.encoded(row), kind)
        except Exception as error:  # a container's library raises its own
            location = source.files.images.location(row)
            problem = DataError(f"cannot read image {location}: {type(error).__name__}: {error}")
            break
    raise_first(problem, names_rank=True)
    return found


def _pixel_digests(source: Source) -> NDArray[np.uint64]:
    """Return a hash of each image in memory, of its pixels as they are kept."""
    found = np.empty(len(source), dtype=np.uint64)
    for rows in torch.arange(len(source)).split(1024):
        pixels = _kept_pixels(source, rows).cpu().numpy()
        for row, image in zip(rows.tolist(), pixels, strict=True):
            found[row] = int.from_bytes(hashlib.blake2b(image.data, digest_size=8).digest(), "big")
    return found


def _kept_pixels(source: Source, rows: Tensor) -> Tensor:
    """Return rows of a source of arrays; those that are kept smaller than they are used are not enlarged for it."""
    if isinstance(source, SubsetSource):
        return _kept_pixels(source.source, source.indices[rows])
    return take_rows(source.images, rows) if isinstance(source, TensorSource) else source.read(rows)


def all_equal(source: Source) -> bool:
    """Return whether all images are copies of one: by pixels if they are in memory, else by their files."""
    if not source.resident and source.files is not None:
        marks = source.files.fingerprints
        if source.files.identity == "content" or bool((marks != marks[0]).any()):
            return bool((marks == marks[0]).all())
    first = source.read(torch.zeros(1, dtype=torch.int64))
    return all(bool((source.read(rows) == first).all()) for rows in torch.arange(len(source)).split(64))
