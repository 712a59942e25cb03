"""Images: sources by kind, decoding of bytes or files, and the order of batches."""

from .config import DataConfig
from .datasets import Splits, open_splits, source_from
from .encoded import EncodedImages, ImagePaths
from .files import FileSource, ImageFiles
from .loader import epoch_batches, prefetch, steps_per_epoch
from .sources import Source, SubsetSource, TensorSource

__all__ = [
    "DataConfig",
    "EncodedImages",
    "FileSource",
    "ImageFiles",
    "ImagePaths",
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
