"""Images in, views out: sources (which images), views (which random parameters), renderers (which pixels), loader."""

from .datasets import DataConfig, Splits, open_splits, source_from
from .errors import DataError
from .files import FileSource, ImageFiles
from .loader import Renderer, ViewMaker, epoch_batches, prefetch, steps_per_epoch
from .render import make_renderer
from .render_dali import DaliRenderer
from .render_fused import FusedRenderer
from .render_torch import TorchRenderer
from .sources import Source, SubsetSource, TensorSource
from .views import AffineView, Params, PlainView, SimCLRView, StrongView, View

__all__ = [
    "AffineView",
    "DaliRenderer",
    "DataConfig",
    "DataError",
    "FileSource",
    "FusedRenderer",
    "ImageFiles",
    "Params",
    "PlainView",
    "Renderer",
    "SimCLRView",
    "Source",
    "Splits",
    "StrongView",
    "SubsetSource",
    "TensorSource",
    "TorchRenderer",
    "View",
    "ViewMaker",
    "epoch_batches",
    "make_renderer",
    "open_splits",
    "prefetch",
    "source_from",
    "steps_per_epoch",
]
