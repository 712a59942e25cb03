"""The images of a run: noted at its start, so that it does not continue on others, and the same on all ranks."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from .. import distributed
from ..data import encoded
from ..data.agreement import check_same, raise_first
from ..data.sources import Source
from ..errors import DataError, RunError
from ..random import permutation, stream_key
from ..runs import artifacts
from ..runs.folder import RunFolder
from ..runs.records import ImageRecord


def check_images(run: RunFolder, sources: Iterable[Source], *, arrays: bool = False) -> None:
    """Note the images of a run that has no results yet; refuse to continue one on other images.

    Args:
        run: the run folder.
        sources: all images, in the order of the run.
        arrays: arrays count too, by their pixels. Without it, only encoded images do, as a data set does not change.

    Raises:
        RunError: if an image is gone, new, or has changed since the run began. The message names it.
    """
    parts = [source for source in sources if arrays or source.files is not None]
    if not parts:
        return
    names = [name for source in parts for name in source.paths]
    now = ImageRecord(names, np.concatenate([_fingerprints(source) for source in parts]))
    if run.has(artifacts.IMAGES) and run.has_results():
        _compare(run, run.read(artifacts.IMAGES), now, dict(entry for source in parts for entry in source.skipped))
    else:
        run.write(artifacts.IMAGES, now)


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
            _compare_ranks(source, rows, _fingerprints_again(source, rows), "another file")


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


def _fingerprints_again(source: Source, rows: Sequence[int]) -> NDArray[np.uint64]:
    """Compute the fingerprints of some encoded images from what this rank reads."""
    assert source.files is not None
    problem = None
    found = np.zeros(len(rows), dtype=np.uint64)
    for place, row in enumerate(rows):
        try:
            found[place] = encoded.fingerprint(source.files.images.encoded(row))
        except Exception as error:  # a container's library raises its own
            location = source.files.images.location(row)
            problem = DataError(f"cannot read image {location}: {type(error).__name__}: {error}")
            break
    raise_first(problem, names_rank=True)
    return found


def _fingerprints(source: Source) -> NDArray[np.uint64]:
    return _pixel_digests(source) if source.files is None else source.files.fingerprints


def _pixel_digests(source: Source) -> NDArray[np.uint64]:
    found = np.empty(len(source), dtype=np.uint64)
    for rows in torch.arange(len(source)).split(1024):
        for row, pixels in zip(rows.tolist(), source.read(rows).cpu().numpy(), strict=True):
            found[row] = int.from_bytes(hashlib.blake2b(pixels.data, digest_size=8).digest(), "big")
    return found


def _compare(run: RunFolder, then: ImageRecord, now: ImageRecord, skipped: dict[str, str]) -> None:
    if then.names == now.names and np.array_equal(then.fingerprints, now.fingerprints):
        return
    before, after = (dict(zip(each.names, each.fingerprints.tolist(), strict=True)) for each in (then, now))
    found = []
    for name, fingerprint in before.items():
        if name not in after:
            found.append(f"{name} cannot be read ({skipped[name]})" if name in skipped else f"{name} is gone")
        elif after[name] != fingerprint:
            found.append(f"{name} has changed")
    found += [f"{name} is new" for name in after if name not in before]
    shown = ", ".join(found[:3]) if found else "their order or their split has changed"
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    raise RunError(
        f"{run.path} holds a run on other images: {shown}{more}. "
        "Undo this, and the same command continues; or choose another folder for a new run"
    )


def all_equal(source: Source) -> bool:
    """Return whether all images are copies of one: by pixels if they are in memory, else by their files."""
    if not source.resident and source.files is not None:
        return bool((source.files.fingerprints == source.files.fingerprints[0]).all())
    first = source.read(torch.zeros(1, dtype=torch.int64))
    return all(bool((source.read(rows) == first).all()) for rows in torch.arange(len(source)).split(64))
