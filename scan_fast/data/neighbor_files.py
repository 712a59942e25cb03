"""Files of nearest neighbours of the SCAN project: ``topk-train-neighbors.npy``, ``topk-val-neighbors.npy``."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..array_files import ObjectsError, read_npy
from ..errors import DataError

NAMES = {"train": "topk-train-neighbors.npy", "test": "topk-val-neighbors.npy"}
"""The names of the files by split; the SCAN project calls the test images "val"."""


def read_neighbors(path: Path, n_images: int, images: str = "images") -> NDArray[np.int64]:
    """Read the nearest neighbours of every image of a data set, without the image itself.

    The file holds int64 (N, k + 1), a row of image numbers for each image, in the order of the data set. The image
    itself is usually the first of its row, but a copy of it may come before it or push it out. So it is removed
    wherever it is, and a row without it loses its last number. A file in which no row names its own image is one of k
    columns.

    Args:
        path: the file. Nothing but numbers is read, so that a foreign file cannot run code.
        n_images: N.
        images: what they are, such as "training images", for errors.

    Returns:
        (N, k) int64 in the order of the file; -1 at the end of a row that names fewer.

    Raises:
        DataError: if there is no such file, it holds something else, or it is of other images.
    """
    if not path.is_file():
        raise DataError(f"there is no file of neighbours {path}")
    try:
        with path.open("rb") as file:
            found = read_npy(file)
    except ObjectsError as error:
        raise DataError(f"{path} was refused: {error}; neighbours are int64 (N, k + 1)") from error
    except ValueError as error:
        raise DataError(f"{path} is not a readable .npy file: {error}") from error
    if found.dtype.kind not in "iu" or found.ndim != 2 or found.shape[1] < 2:
        raise DataError(f"{path} holds {found.dtype} {found.shape}; neighbours are int64 (N, k + 1)")
    if len(found) != n_images:
        raise DataError(f"{path} is of {len(found):,} images, there are {n_images:,} {images}")
    if found.max() >= n_images or found.min() < -1:
        wrong = int(found.max() if found.max() >= n_images else found.min())
        raise DataError(f"{path} names image {wrong}; the {images} are numbered from 0 to {n_images - 1}")
    found = found.astype(np.int64)
    own = found == np.arange(n_images)[:, None]
    share = float(own.any(axis=1).mean())
    if share == 0:
        return found
    if share < 0.5:
        raise DataError(
            f"{path} is of other images, or of the same in another order: only {share:.1%} of its rows name their own "
            "image, which is its own nearest neighbour"
        )
    left_out = own | (found < 0)
    # A stable order keeps the others as they are and brings what is left out to the end.
    order = np.argsort(left_out, axis=1, kind="stable")[:, :-1]
    return np.where(np.take_along_axis(left_out, order, axis=1), -1, np.take_along_axis(found, order, axis=1))


def dump_neighbors(index: NDArray[np.int64], file: BinaryIO) -> None:
    """Write nearest neighbours as the SCAN project does, for :func:`read_neighbors` and for that project.

    Args:
        index: (N, k) int64 rows of the same images, without the image itself; -1 at the end of a row that has fewer.
        file: gets int64 (N, k + 1), each image before its neighbours. In place of -1, which the project would take for
            the last image, the image itself stands again.
    """
    own = np.arange(len(index), dtype=np.int64)[:, None]
    np.save(file, np.concatenate([own, np.where(index < 0, own, index)], axis=1), allow_pickle=False)
