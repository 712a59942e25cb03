"""Views (augmented versions of images): random parameters per sample, and renderers that compute the pixels."""

from .maker import Renderer, ViewMaker
from .parameters import AffineView, Params, PlainView, SimCLRView, StrongView, View
from .render_dali import DaliRenderer
from .render_fused import FusedRenderer
from .render_torch import TorchRenderer
from .renderers import make_renderer

__all__ = [
    "AffineView",
    "DaliRenderer",
    "FusedRenderer",
    "Params",
    "PlainView",
    "Renderer",
    "SimCLRView",
    "StrongView",
    "TorchRenderer",
    "View",
    "ViewMaker",
    "make_renderer",
]
