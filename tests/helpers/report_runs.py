"""Small run folders for the report, and its page read back by a parser that knows nothing of the template."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource
from scan_fast.data.sources import Source, TensorSource
from scan_fast.report import write_report
from scan_fast.runs.csv_files import path_cell, text_cell
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.verification import accept

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def values(self, tag: str, name: str) -> list[str]:
        """Return the values of an attribute, in the order of the page."""
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]

    @property
    def words(self) -> str:
        """The visible text with single spaces."""
        return re.sub(r" ([,.])", r"\1", re.sub(r"[ \n]+", " ", " ".join(self.text)))

    @property
    def data(self) -> dict[str, Any]:
        """What the page's scripts know of each image, if it is inside the page."""
        found: dict[str, Any] = json.loads(self.scripts[0])
        return found


def write_run(
    folder: Path,
    rows: Iterable[Sequence[Any]],
    *,
    extra: tuple[str, ...] = (),
    n_clusters: int | None = 3,
    settings: str = "",
) -> None:
    """Write assignments.csv (path, split, cluster, confidence, margin and what ``extra`` names) and config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "assignments.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "split", "cluster", "confidence", "margin", *extra])
        writer.writerows((path_cell(row[0]), *row[1:5], *(text_cell(str(cell)) for cell in row[5:])) for row in rows)
    (folder / "config.yaml").write_text(
        f"seed: 5\nmodel:\n  backbone: resnet_digits\nclustering:\n  n_clusters: {n_clusters or 'null'}\n{settings}"
    )
    accept(RunFolder(folder))


def simple_rows(labelled: bool = False) -> list[tuple[Any, ...]]:
    """Return 90 rows in three groups of two splits."""
    rows = []
    for i in range(90):
        split = "test" if i % 3 == 2 else "train"
        row = (f"{split}/{i}.png", split, i % 2 if i < 80 else 2, f"{0.5 + i / 200:.4f}", f"{i / 100:.2f}")
        rows.append((*row, ["cat", "dog"][i % 2] if i != 4 else "") if labelled else row)
    return rows


def colour(split: str, row: int) -> tuple[int, int, int]:
    """Return the colour of an image of :func:`plain_sources`."""
    return (row * 7 % 256, 200 if split == "test" else 20, row * 31 % 256)


def plain_sources(rows: Iterable[Sequence[Any]]) -> dict[str, Source]:
    """Return images in memory for these rows, each of one colour."""
    paths: dict[str, list[str]] = {}
    for path, split, *_ in rows:
        paths.setdefault(split, []).append(path)
    return {
        split: TensorSource(
            torch.tensor([colour(split, i) for i in range(len(own))], dtype=torch.uint8)
            .view(-1, 1, 1, 3)
            .expand(-1, 8, 8, 3),
            paths=own,
        )
        for split, own in paths.items()
    }


def report_of(folder: Path, sources: Mapping[str, Source], **options: Any) -> str:
    """Write the report of files that a test has written, and return the page's text."""
    accept(RunFolder(folder))
    return write_report(RunFolder(folder), sources, **{"title": "t", **options}).read_text(encoding="utf-8")


def photograph(seed: int, size: tuple[int, int] = (320, 240)) -> Image.Image:
    """Return a picture with large and small shapes in many colours, as no other seed gives it."""
    draw_from = np.random.default_rng(seed)
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / draw_from.uniform(20, 90) + y / draw_from.uniform(20, 90) + c) for c in range(3)]
    image = Image.fromarray((127 + 80 * np.stack(waves, axis=-1)).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        left, top = int(draw_from.integers(0, width)), int(draw_from.integers(0, height))
        right, bottom = left + int(draw_from.integers(10, width // 2)), top + int(draw_from.integers(10, height // 2))
        shape = draw.ellipse if draw_from.random() < 0.5 else draw.rectangle
        shape((left, top, right, bottom), fill=tuple(int(v) for v in draw_from.integers(0, 256, 3)))
    return image


def file_source(folder: Path, names: Sequence[str]) -> FileSource:
    """Open files as a source that decodes them at each use."""
    return FileSource(ImagePaths(list(names), folder), None, 16, resident=False)


def grouped_run(run: Path, images: Path, names: Sequence[str], embeddings: Any = None, **options: Any) -> FileSource:
    """Write a run of files in two groups, with embeddings if they are given, and return its images."""
    write_run(run, [(name, "train", i % 2, "0.9", "0.8") for i, name in enumerate(names)], n_clusters=2, **options)
    if embeddings is not None:
        rows = np.asarray(embeddings, dtype=np.float32)
        np.savez(run / "embeddings.npz", train=rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return file_source(images, names)
