"""The data of the page's scripts: compact columns with one entry per image."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any
from urllib.parse import quote

import numpy as np

from ..text import shown
from .content import Content
from .findings import Findings
from .originals import Originals
from .overview import Group

IN_MARKUP = 1
"""The thumbnail is in the page's markup already, as data URL of an image with this row."""
ORIGINAL = 2
"""There is no thumbnail, but the original is small enough to be shown itself."""
_LARGEST_SHOWN = 1 << 20  # bytes
_SHOWN = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".avif", ".bmp")
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.!~*'()")


def page_data(
    content: Content,
    groups: Sequence[Group],
    findings: Findings,
    originals: Originals,
    thumbnails: Mapping[int, str | int],
    page_folder: str,
) -> dict[str, Any]:
    """Return the columns, with one entry per image in the order of assignments.csv.

    Args:
        content: the artifacts of the run.
        groups: all groups.
        findings: what was found among the images.
        originals: the images.
        thumbnails: by image, a URL or :data:`IN_MARKUP`.
        page_folder: the folder of the page, from which the links start.
    """
    table = content.assignments
    folders: dict[tuple[str, str], int] = {}
    names, in_folder, hrefs, pictures = [], [], {}, []
    url_of = cache(partial(folder_url, page_folder=page_folder))
    for number, path in enumerate(table.paths):
        file = originals.file(number)
        head, _, name = path.rpartition("/")
        url = "" if file is None else url_of(os.path.dirname(file))
        in_folder.append(folders.setdefault((f"{shown(head)}/" if head else "", url), len(folders)))
        names.append(shown(name))
        if file is not None:
            own = quote(os.fsencode(os.path.basename(file)), safe="")
            if os.path.basename(file) != name or not _PLAIN.issuperset(name):
                hrefs[number] = own
        thumbnail = thumbnails.get(number, 0)
        if not thumbnail and file is not None and _can_be_shown(file, originals.n_bytes(number)):
            thumbnail = ORIGINAL
        pictures.append(thumbnail)
    positions = findings.positions
    places = None if positions is None else np.rint(np.clip(positions, 0, 1) * 9999).astype(int)
    labels = None if table.labels is None else list(dict.fromkeys(table.labels))
    rank = {label: i for i, label in enumerate(labels or ())}
    return {
        "digest": table.digest,
        "groups": [
            {"id": g.id, "title": g.title, "named": g.named, "size": g.size, "color": g.color} for g in groups if g.size
        ],
        "folders": [list(folder) for folder in folders],
        "name": names,
        "folder": in_folder,
        "href": hrefs,
        "thumb": pictures,
        "group": table.clusters.tolist(),
        "confidence": np.rint(np.nan_to_num(table.confidence, nan=-0.001) * 1000).astype(int).tolist(),
        "labels": None if labels is None else list(map(shown, labels)),
        "label": None if table.labels is None else [rank[label] for label in table.labels],
        "x": None if places is None else places[:, 0].tolist(),
        "y": None if places is None else places[:, 1].tolist(),
        "copies": findings.duplicates,
        "odd": [number for number, _, _ in findings.outliers],
    }


def folder_url(folder: str, page_folder: str) -> str:
    """Return the URL of a folder, with a slash at its end: relative to the page if both share a folder but the root."""
    folder, page_folder = os.path.abspath(folder), os.path.abspath(page_folder)
    try:
        common = os.path.commonpath([folder, page_folder])
    except ValueError:  # other drives
        common = ""
    if common and os.path.dirname(common) != common:
        return quote(os.fsencode(os.path.relpath(folder, page_folder).replace(os.sep, "/"))) + "/"
    slashes = folder.replace(os.sep, "/")
    return "file://" + quote(os.fsencode(slashes if slashes.startswith("/") else f"/{slashes}")) + "/"


def _can_be_shown(file: str, n_bytes: int) -> bool:
    return file.lower().endswith(_SHOWN) and 0 < n_bytes <= _LARGEST_SHOWN


def for_script(data: Mapping[str, Any]) -> str:
    """Return JSON that may stand inside a script element."""
    # ASCII alone: lone surrogates of file names that are no text stay what they are.
    text = json.dumps(data, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def as_script(data: Mapping[str, Any]) -> str:
    """Return a script that hands the data to the page. JSON in a string is read faster than a script's own notation."""
    return f"window.scanFast=JSON.parse({json.dumps(for_script(data))});\n"
