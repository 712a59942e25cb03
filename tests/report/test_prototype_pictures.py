"""The picture and the table of prototypes, read back."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from scan_fast.data.encoded import ImagePaths
from scan_fast.data.files import FileSource
from scan_fast.data.sources import TensorSource
from scan_fast.report.prototypes import SMALL_TILE, TILE, find_prototypes, prototypes_png, write_prototypes

COLORS = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0)]


@pytest.fixture
def source() -> TensorSource:
    """Eight images of 8 pixels: two of each colour."""
    pixels = np.array([COLORS[i // 2] for i in range(8)], dtype=np.uint8)
    images = torch.from_numpy(np.broadcast_to(pixels[:, None, None], (8, 8, 8, 3)).copy())
    return TensorSource(images, paths=[f"image,{i}" for i in range(8)])


def probabilities(n_clusters: int) -> torch.Tensor:
    """The clusters 0 to 3 have two images each, the first of them less confident; further clusters are empty."""
    table = torch.full((8, n_clusters), 0.01)
    for i in range(8):
        table[i, i // 2] = 0.9 + 0.01 * (i % 2)
    return table


FEATURES = torch.tensor([[0.0], [4.0], [0.0], [1.0], [5.0], [5.0], [0.0], [9.0]])


def colors_of(png: bytes, left: int, top: int, side: int) -> set[tuple[int, ...]]:
    with Image.open(io.BytesIO(png)) as image:
        pixels = np.asarray(image.convert("RGB"))[top : top + side, left : left + side]
    return set(map(tuple, pixels.reshape(-1, 3).tolist()))


def test_each_cluster_shows_its_own_image(source: TensorSource, tmp_path: Path) -> None:
    found = find_prototypes(source, probabilities(5), FEATURES, ["a", "", "c", "d", ""], "test")
    assert [each.cluster for each in found] == [0, 1, 2, 3]
    assert [each.row // 2 for each in found] == [0, 1, 2, 3]
    png = prototypes_png(source, found, 5, {1: "$gr$een"})
    for cluster, color in enumerate([*COLORS, (225, 225, 225)]):
        assert colors_of(png, 12 + cluster * (TILE + 12), 12, TILE) == {color}
    with Image.open(io.BytesIO(png)) as image:
        assert image.width == 5 * (TILE + 12) + 12
        text = np.asarray(image.convert("L"))[12 + TILE :]
    # Dark letters below each image: number or name, class, confidence.
    for cluster in range(5):
        left = 12 + cluster * (TILE + 12)
        assert (text[:, left : left + TILE] < 100).any()
    table = write_prototypes(tmp_path / "p.png", source, found, 5)
    assert table == tmp_path / "p.csv"
    with table.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["cluster", "class", "path", "split", "row", "confidence", "distance"]
    assert rows[1] == ["0", "a", "image,0", "test", "0", "0.900000", "2.000000"]
    assert rows[2][1] == "" and len(rows) == 5
    assert colors_of((tmp_path / "p.png").read_bytes(), 12, 12, TILE) == {COLORS[0]}


def test_without_classes_there_is_no_column(source: TensorSource, tmp_path: Path) -> None:
    found = find_prototypes(source, probabilities(4), FEATURES)
    table = write_prototypes(tmp_path / "p.png", source, found, 4)
    assert table.read_text().splitlines()[0] == "cluster,path,split,row,confidence,distance"


def test_originals_are_shown_and_lost_ones_are_grey(tmp_path: Path) -> None:
    for number, color in enumerate(COLORS[:2]):
        image = Image.new("RGB", (300, 150), color)
        image.paste((0, 0, 0), (0, 0, 150, 150))  # outside the square that training sees is still shown
        image.save(tmp_path / f"{number}.png")
    source = FileSource(ImagePaths(["0.png", "1.png"], tmp_path), None, 8, resident=False)
    table = torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    found = find_prototypes(source, table, torch.zeros(2, 1))
    (tmp_path / "1.png").unlink()
    png = prototypes_png(source, found, 2, {})
    # 160 x 80 in the middle of the tile.
    assert colors_of(png, 12 + 4, 12 + 44, 72) == {(0, 0, 0)}
    assert colors_of(png, 12 + 84, 12 + 44, 72) == {COLORS[0]}
    assert colors_of(png, 12, 12, 36) == {(255, 255, 255)}
    assert colors_of(png, 12 + TILE + 12, 12, TILE) == {(225, 225, 225)}


def test_many_clusters_get_smaller_images(source: TensorSource) -> None:
    found = find_prototypes(source, probabilities(200), FEATURES)
    png = prototypes_png(source, found, 200, {})
    with Image.open(io.BytesIO(png)) as image:
        assert max(image.size) < 2600
    assert colors_of(png, 12, 12, SMALL_TILE) == {COLORS[0]}
    assert colors_of(png, 12 + 3 * (SMALL_TILE + 12), 12, SMALL_TILE) == {COLORS[3]}
