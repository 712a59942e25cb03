"""The images of a run, noted at its start: a run does not continue on others, and never groups copies of one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from ..data.sources import Source
from ..errors import RunError
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


def _fingerprints(source: Source) -> NDArray[np.uint64]:
    if source.files is not None:
        return source.files.fingerprints
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
