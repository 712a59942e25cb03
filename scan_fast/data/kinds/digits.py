"""Handwritten digits of scikit-learn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ...random import permutation, stream_key
from ..decode_cache import DecodeCache
from ..sources import TensorSource
from .kind import Opened, SourceKind

if TYPE_CHECKING:
    from ..config import DataConfig


def _open(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    """Open the 1,797 digits of 8x8 pixels; a fixed random quarter is the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8)).unsqueeze(-1)
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = permutation(stream_key(0, "digits"), 0, len(grey))
    cut = len(grey) // 4

    def part(name: str, indices: Tensor) -> TensorSource:
        paths = [f"digits/{name}/{i:04d}" for i in indices.tolist()]
        names = [str(d) for d in range(10)]
        return TensorSource(grey[indices], labels[indices], paths, names, config.image_size, config.filter)

    return Opened(part("train", order[cut:].sort().values), part("test", order[:cut].sort().values))


DIGITS = SourceKind(
    "digits",
    _open,
    # Of the images as this module makes them.
    statistics=((0.3053, 0.3053, 0.3053), (0.3759, 0.3759, 0.3759)),
)
