"""Images: which ones (sources), how they are read (files, decoding), in which order (loader)."""

from .datasets import DataConfig, Splits, open_splits, source_from
from .files import FileSource, ImageFiles
from .loader import epoch_batches, prefetch, steps_per_epoch
from .sources import Source, SubsetSource, TensorSource

__all__ = [
    "DataConfig",
    "FileSource",
    "ImageFiles",
    "Source",
    "Splits",
    "SubsetSource",
    "TensorSource",
    "epoch_batches",
    "open_splits",
    "prefetch",
    "source_from",
    "steps_per_epoch",
]
