"""Checked conversion of arguments (NumPy arrays, tensors on any device, lists) to NumPy arrays."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray


def as_array(values: ArrayLike | torch.Tensor) -> NDArray[np.generic]:
    """Return ``values`` as a NumPy array. bfloat16 becomes float32, because NumPy has no bfloat16."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return np.asarray(values)


def as_ids(values: ArrayLike | torch.Tensor, name: str, count: int | None, lowest: int = 0) -> NDArray[np.int64]:
    """Return ``values`` as (N,) int64, each from ``lowest`` to ``count`` - 1 (no upper bound if None).

    Raises:
        ValueError: names the argument, for another shape, a dtype that is not integer, or an id out of range.
    """
    array = as_array(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers of shape (N,), got {array.dtype} {array.shape}")
    low, high = int(array.min()), int(array.max())
    if low < lowest or (count is not None and high >= count):
        upper = "" if count is None else f" to {count - 1}"
        raise ValueError(f"{name} must be from {lowest}{upper}, got {low} to {high}")
    return array.astype(np.int64)


def as_matrix(
    values: ArrayLike | torch.Tensor, name: str, rows: int | None = None, columns: int | None = None
) -> NDArray[np.float64]:
    """Return ``values`` as (rows, columns) float64; None allows any size.

    Raises:
        ValueError: names the argument, for another shape or a NaN.
    """
    array = as_array(values)
    wrong = array.ndim != 2 or array.dtype.kind not in "fiu"
    if wrong or (rows not in (None, array.shape[0])) or (columns not in (None, array.shape[1])):
        wanted = f"({'N' if rows is None else rows}, {'D' if columns is None else columns})"
        raise ValueError(f"{name} must be numbers of shape {wanted}, got {array.dtype} {array.shape}")
    matrix = array.astype(np.float64)
    if np.isnan(matrix).any():
        raise ValueError(f"{name} must not hold NaN, got {int(np.isnan(matrix).any(axis=1).sum())} rows with it")
    return matrix
