"""Files of neighbours of the SCAN project."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scan_fast.data.neighbor_files import dump_neighbors, read_neighbors
from scan_fast.errors import DataError


def saved(tmp_path: Path, values: Any) -> Path:
    path = tmp_path / "topk-train-neighbors.npy"
    np.save(path, values)
    return path


def test_the_image_itself_is_removed_wherever_it_is(tmp_path: Path) -> None:
    rows = np.array([[0, 1, 2], [2, 1, 0], [0, 1, 2], [0, 2, 1]])  # first, second, third, pushed out by copies
    found = read_neighbors(saved(tmp_path, rows), 4)
    assert found.dtype == np.int64
    assert found.tolist() == [[1, 2], [2, 0], [0, 1], [0, 2]]


def test_rows_with_fewer_neighbours_end_in_none(tmp_path: Path) -> None:
    rows = np.array([[0, -1, 2], [1, 1, 0], [2, 1, 0]], dtype=np.int32)
    assert read_neighbors(saved(tmp_path, rows), 3).tolist() == [[2, -1], [0, -1], [1, 0]]


def test_a_file_without_the_images_themselves_keeps_all_columns(tmp_path: Path) -> None:
    assert read_neighbors(saved(tmp_path, np.array([[1, 2], [2, 0], [0, 1]])), 3).tolist() == [[1, 2], [2, 0], [0, 1]]


@pytest.mark.parametrize(
    ("rows", "n", "message"),
    [
        (np.zeros((3, 2)), 3, r"holds float64 \(3, 2\); neighbours are int64"),
        (np.zeros(3, dtype=np.int64), 3, r"holds int64 \(3,\)"),
        (np.zeros((3, 1), dtype=np.int64), 3, r"holds int64 \(3, 1\)"),
        (np.zeros((3, 2), dtype=np.int64), 4, "is of 3 images, there are 4 training images"),
        (np.array([[0, 1], [1, 3], [2, 0]]), 3, "names image 3; the training images are numbered from 0 to 2"),
        (np.array([[0, 1], [1, -2], [2, 0]]), 3, "names image -2"),
        (np.array([[0, 1], [2, 0], [1, 0], [1, 2]]), 4, "in another order: only 25.0% of its rows name their own"),
    ],
)
def test_files_of_other_images_are_refused(tmp_path: Path, rows: Any, n: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_neighbors(saved(tmp_path, rows), n, "training images")


def test_written_neighbours_come_back(tmp_path: Path) -> None:
    index = np.array([[2, 1, 3], [0, 3, -1], [-1, -1, -1], [1, 0, 2]])
    file = io.BytesIO()
    dump_neighbors(index, file)
    file.seek(0)
    content = np.load(file)
    assert (content.dtype, content.flags.c_contiguous) == (np.int64, True)
    # No -1, which the SCAN project would take for the last image.
    assert content.tolist() == [[0, 2, 1, 3], [1, 0, 3, 1], [2, 2, 2, 2], [3, 1, 0, 2]]
    path = tmp_path / "written.npy"
    path.write_bytes(file.getvalue())
    assert read_neighbors(path, 4).tolist() == index.tolist()


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_malicious_file_is_refused_and_not_run(tmp_path: Path) -> None:
    proof = tmp_path / "executed"
    objects = np.empty((2, 2), dtype=object)
    objects[:] = Malicious(f"touch {proof}")
    path = saved(tmp_path, objects)
    with pytest.raises(DataError, match="was refused: it holds Python objects") as info:
        read_neighbors(path, 2)
    assert "allow_pickle" not in str(info.value)
    path.write_bytes(pickle.dumps(Malicious(f"touch {proof}")))
    with pytest.raises(DataError, match=r"is not a readable \.npy file"):
        read_neighbors(path, 2)
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"is not a readable \.npy file"):
        read_neighbors(path, 2)
    with pytest.raises(DataError, match="there is no file"):
        read_neighbors(tmp_path / "absent.npy", 2)
    assert not proof.exists()
