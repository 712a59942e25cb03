"""Group images without labels in the manner of SCAN, with fused C++ and CUDA kernels.

The losses and the neighbour search import torch only. :class:`ImageClusterer` needs the training driver, which is
imported when the class is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import openmp as _openmp  # noqa: F401 -- before torch
from .losses import NTXentLoss, SCANLoss, SelfLabelLoss, nt_xent, scan_loss, self_label_loss
from .neighbors import topk_neighbors

if TYPE_CHECKING:
    from .estimator import ImageClusterer

__version__ = "0.1.0"

__all__ = [
    "ImageClusterer",
    "NTXentLoss",
    "SCANLoss",
    "SelfLabelLoss",
    "__version__",
    "nt_xent",
    "scan_loss",
    "self_label_loss",
    "topk_neighbors",
]


def __getattr__(name: str) -> Any:
    if name == "ImageClusterer":
        from .estimator import ImageClusterer

        return ImageClusterer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
