"""Thumbnails of the original images: one small file each, which later reports use again.

One file per image, rather than sheets of many: a file is named by its image and its time of change, so another
grouping, a filter or a search load what they show and nothing else, and a changed image costs one file.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..evaluation.pictures import pixel_digest
from ..runs.tables import Assignments
from .originals import Originals

SIDE = 192
"""The longer side in pixels: the shorter side of a usual photograph then fills a tile of the page."""
_TINY = 48
"""JPEG would show its blocks in smaller pictures; as PNG they cost little."""
_QUALITY = 80
_AT_ONCE = 512


def choose(table: Assignments, limit: int, first: Iterable[int] = ()) -> NDArray[np.int64]:
    """Choose the images that get a thumbnail: all if they are no more than ``limit``, else some of each group.

    Small groups are taken whole and large ones share what is left. Of a group, images are taken at even steps of
    confidence, the most confident included.

    Args:
        table: the assignments.
        limit: the largest number of thumbnails.
        first: images to take in any case, as long as there is room.

    Returns:
        (n,) their numbers in ascending order.
    """
    n = len(table.paths)
    if n <= limit:
        return np.arange(n)
    taken = np.array(sorted(set(first)), dtype=np.int64)[:limit]
    order = np.lexsort((np.arange(n), -np.nan_to_num(table.confidence, nan=-1.0), table.clusters))
    order = order[~np.isin(order, taken)]
    groups = np.split(order, np.flatnonzero(np.diff(table.clusters[order])) + 1) if order.size else []
    chosen = [taken]
    room = limit - taken.size
    for number, members in enumerate(sorted(groups, key=len)):
        share = min(len(members), room // (len(groups) - number))
        if share:
            chosen.append(members[np.linspace(0, len(members) - 1, share).round().astype(np.int64)])
        room -= share
    return np.unique(np.concatenate(chosen))


def write_thumbnails(folder: Path, originals: Originals, numbers: Sequence[int] | NDArray[np.int64]) -> dict[int, str]:
    """Write the thumbnails that are not there yet, in threads, and remove those that nothing shows any more.

    Args:
        folder: the folder of thumbnails.
        originals: the images.
        numbers: the images that get one.

    Returns:
        The path relative to ``folder`` of each image's thumbnail; images that cannot be read have none.

    Raises:
        OSError: if a file cannot be written.
    """

    def one(number: int) -> str | None:
        key = originals.identity(number)
        if key is not None:
            name = _name(key)
            for suffix in (".jpg", ".png"):
                if _is_whole(folder / (name + suffix)):
                    return name + suffix
        picture = originals.picture(number, SIDE)
        if picture is None:
            return None
        name = _name(key if key is not None else pixel_digest(picture).hex()) + _suffix(picture)
        if not _is_whole(folder / name):
            _write(folder / name, encode(picture))
        return name

    found = dict(_in_threads(one, numbers))
    _remove_others(folder, {name for name in found.values() if name})
    return {number: name for number, name in found.items() if name}


def data_urls(folder: Path, originals: Originals, numbers: Sequence[int] | NDArray[np.int64]) -> dict[int, str]:
    """Return the thumbnails as data URLs; those in ``folder`` are used and no others written."""

    def one(number: int) -> str | None:
        key = originals.identity(number)
        for suffix in (".jpg", ".png") if key is not None else ():
            path = folder / (_name(str(key)) + suffix)
            if _is_whole(path):
                return _url(path.read_bytes(), suffix)
        picture = originals.picture(number, SIDE)
        return None if picture is None else _url(encode(picture), _suffix(picture))

    return {number: url for number, url in _in_threads(one, numbers) if url}


def encode(picture: Image.Image) -> bytes:
    """Return a thumbnail as JPEG, or as PNG if it is tiny."""
    buffer = io.BytesIO()
    if _suffix(picture) == ".png":
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _suffix(picture: Image.Image) -> str:
    return ".png" if max(picture.size) <= _TINY else ".jpg"


def _url(content: bytes, suffix: str) -> str:
    kind = "png" if suffix == ".png" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _name(key: str) -> str:
    digest = hashlib.blake2b(f"{SIDE}|{_QUALITY}|{key}".encode(errors="surrogateescape"), digest_size=9).hexdigest()
    return f"{digest[:2]}/{digest[2:]}"


def _is_whole(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _write(path: Path, content: bytes) -> None:
    # Renamed, so that no reader finds a part of it, but not forced to the disk as other files of a run are: that would
    # take longer than all the rest, and a lost thumbnail is made again.
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _in_threads(
    function: Callable[[int], str | None], numbers: Sequence[int] | NDArray[np.int64]
) -> list[tuple[int, str | None]]:
    wanted = [int(number) for number in numbers]
    workers = min(16, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    found: list[tuple[int, str | None]] = []
    with ThreadPoolExecutor(workers, thread_name_prefix="thumbnail") as pool:
        for start in range(0, len(wanted), _AT_ONCE):
            part = wanted[start : start + _AT_ONCE]
            found += zip(part, pool.map(function, part), strict=True)
    return found


def _remove_others(folder: Path, kept: set[str]) -> None:
    for path in folder.glob("[0-9a-f][0-9a-f]/*"):
        if path.relative_to(folder).as_posix() not in kept and path.suffix in (".jpg", ".png", ".tmp"):
            path.unlink(missing_ok=True)
