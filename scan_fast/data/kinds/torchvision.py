"""Data sets that torchvision downloads and reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...errors import DataError
from ..agreement import in_turn
from ..sources import TensorSource

if TYPE_CHECKING:
    from ..config import DataConfig


def open_torchvision(name: str, config: DataConfig, **options: Any) -> Any:
    """Open a torchvision data set, downloading it if the configuration allows.

    Raises:
        DataError: if it is neither there nor can be downloaded.
    """
    from torchvision import datasets

    root = (config.root or Path("~/.cache/scan-fast/data")).expanduser()

    def opened() -> Any:
        if config.download:
            root.mkdir(parents=True, exist_ok=True)
        return getattr(datasets, name)(root=str(root), download=config.download, **options)

    return in_turn(lambda: _or_advice(opened, root, config))


def _or_advice(opened: Callable[[], Any], root: Path, config: DataConfig) -> Any:
    try:
        return opened()
    except (OSError, RuntimeError) as error:
        advice = (
            "check the network, or put the data set's original archive there and set data.download=false"
            if config.download
            else "set data.download=true, or data.root to the folder that holds the data set"
        )
        raise DataError(f"{config.source} cannot be opened in {root}: {error}. To go on, {advice}.") from error


def array_source(
    name: str, images: np.ndarray, labels: Sequence[int] | np.ndarray, names: Sequence[str], config: DataConfig
) -> TensorSource:
    """Return (N, H, W, 3) uint8 images as a source with numbered paths."""
    width = len(str(len(images) - 1))
    paths = [f"{config.source}/{name}/{i:0{width}d}" for i in range(len(images))]
    return TensorSource(
        torch.from_numpy(images),
        torch.tensor(labels, dtype=torch.int64),
        paths,
        names,
        config.image_size,
        config.filter,
    )
