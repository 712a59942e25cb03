"""One folder per group, with links to the images or copies of them. Nothing is ever moved, replaced or removed."""

from __future__ import annotations

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from ..data.decode import open_image
from ..data.formats import IMAGE_SUFFIXES
from ..data.sources import Source
from ..errors import UsageError
from ..runs import artifacts
from ..runs.folder import RunFolder
from .originals import Originals

How = Literal["link", "copy"]
MARKER = ".scan-fast-folders.json"
"""In a folder that this module has made: what it holds, so that the same command may go on there and no other."""
_LONGEST = 60  # characters of a folder's name
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


def write_folders(run: RunFolder, sources: Mapping[str, Source], out: Path, how: How = "link") -> dict[str, int]:
    """Sort the images of a run into a folder for each group, called by its name or ``group-03``.

    A link is a symbolic one; if the file system has none, a hard link, and if that fails too, a copy. Images in
    containers are written as files. A command that was interrupted continues when it is given again.

    Args:
        run: the run folder.
        sources: the images by split.
        out: the folder to fill: a new or an empty one, or one that the same command has begun.
        how: "link" or "copy".

    Returns:
        The number of images by folder.

    Raises:
        UsageError: if ``out`` holds anything else, or lies in a folder of the images.
        RunError: if the assignments are missing or damaged.
        OSError: if a file cannot be read or written.
    """
    table = run.read(artifacts.ASSIGNMENTS)
    names = run.group_names(table)
    originals = Originals(sources, table)
    content = {"assignments": table.digest, "names": {str(k): v for k, v in sorted(names.items())}, "how": how}
    _check(out, originals, content)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    folders = folder_names(int(table.clusters.max(initial=-1)) + 1, names)
    taken: dict[str, set[str]] = {name: set() for name in folders}
    counts = dict.fromkeys(folders, 0)
    for number, cluster in enumerate(table.clusters.tolist()):
        folder = folders[cluster]
        source = originals.file(number)
        wanted = os.path.basename(source) if source is not None else _plain(table.paths[number].rpartition("/")[2])
        data = None if source is not None else originals.content(number)
        if data is not None and os.path.splitext(wanted)[1].lower() not in IMAGE_SUFFIXES:
            wanted += _suffix(data)
        name = _free(wanted, taken[folder])
        target = out / folder / name
        target.parent.mkdir(exist_ok=True)
        if not os.path.lexists(target):
            _place(source, data, target, how)
        counts[folder] += 1
    return {name: n for name, n in counts.items() if n}


def folder_names(n_groups: int, names: Mapping[int, str]) -> list[str]:
    """Return a name for each group's folder that every file system takes, each another one."""
    width = max(2, len(str(n_groups - 1)))
    taken: set[str] = set()
    return [_free(_plain(names.get(group, f"group-{group:0{width}d}")), taken) for group in range(n_groups)]


def _check(out: Path, originals: Originals, content: Mapping[str, object]) -> None:
    real = Path(os.path.realpath(out))
    for folder in originals.folders():
        images = Path(os.path.realpath(folder))
        if real == images or images in real.parents:
            raise UsageError(
                f"{out} lies in the folder of the images ({folder}), where the next run would find every image twice; "
                "choose a folder outside it"
            )
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; choose a new folder")
    entries = {entry.name for entry in out.iterdir()}
    if not entries:
        return
    if MARKER not in entries:
        raise UsageError(f"{out} is not empty; choose a new folder, for nothing is overwritten")
    try:
        known = json.loads((out / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        known = None
    if known != content:
        raise UsageError(
            f"{out} holds another grouping, other names, or copies instead of links; choose a new folder, or remove it "
            "yourself"
        )


def _place(source: str | None, data: bytes | None, target: Path, how: How) -> None:
    if data is not None:
        _through(target, lambda path: path.write_bytes(data))
        return
    assert source is not None
    if how == "link":
        for link in (os.symlink, os.link):
            try:
                link(source, target)
                return
            except (OSError, NotImplementedError):
                continue
    _through(target, lambda path: shutil.copy2(source, path))


def _through(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target and rename, so that an interruption leaves no part of a file under its name."""
    temporary = target.with_name(f".{os.getpid()}.tmp")
    try:
        write(temporary)
        os.rename(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _free(name: str, taken: set[str]) -> str:
    """Return the name, with a number if it is taken; file systems may not tell upper from lower case."""
    stem, suffix = os.path.splitext(name)
    number = 1
    candidate = name
    while unicodedata.normalize("NFC", candidate).casefold() in taken:
        number += 1
        candidate = f"{stem}-{number}{suffix}"
    taken.add(unicodedata.normalize("NFC", candidate).casefold())
    return candidate


def _plain(name: str) -> str:
    text = "".join("_" if c in '/\\:*?"<>|' or unicodedata.category(c)[0] == "C" else c for c in name)
    text = text[:_LONGEST].strip(" .") or "_"
    return f"_{text}" if _RESERVED.match(text) else text


def _suffix(data: bytes) -> str:
    try:
        with open_image(data) as image:
            return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(image.format or "", f".{image.format}".lower())
    except Exception:  # what is no image may fail in any way
        return ""
