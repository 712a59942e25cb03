"""STL-10."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from ..decode_cache import DecodeCache
from ..sources import TensorSource
from .kind import Opened, SourceKind
from .torchvision import array_source, open_torchvision

if TYPE_CHECKING:
    from ..config import DataConfig


def _open(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    """Open STL-10; its 100,000 unlabelled images join the training images for the pretext stage."""
    train, test, extra = (open_torchvision("STL10", config, split=split) for split in ("train", "test", "unlabeled"))

    def interleaved(data: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(data.transpose(0, 2, 3, 1))

    train_source = array_source("train", interleaved(train.data), train.labels, train.classes, config)
    test_source = array_source("test", interleaved(test.data), test.labels, test.classes, config)
    # Fill one array: the unlabelled images alone take 2.8 GB, and a concatenation would hold them twice.
    images = np.empty((len(train.data) + len(extra.data), 96, 96, 3), dtype=np.uint8)
    images[: len(train.data)] = train.data.transpose(0, 2, 3, 1)
    images[len(train.data) :] = extra.data.transpose(0, 2, 3, 1)
    paths = [*train_source.paths, *(f"stl10/unlabeled/{i:05d}" for i in range(len(extra.data)))]
    everything = TensorSource(torch.from_numpy(images), None, paths, None, config.image_size, config.filter)
    return Opened(train_source, test_source, everything)


STL10 = SourceKind("stl10", _open)
