"""Renders views of a source's images: parameters by sample, pixels by a renderer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.files import ImageFiles
from ..data.sources import Source
from ..random import Key, stream_key
from .parameters import Params, View

#: Turns (n, H, W, 3) uint8 images and their parameters into the (n, 3, size, size) normalised view.
Renderer = Callable[[Tensor, View, Params], Tensor]


@runtime_checkable
class DecodingRenderer(Protocol):
    """A renderer that cuts boxes out of files by itself, as :meth:`scan_fast.data.files.ImageFiles.cut`."""

    def cut(
        self, files: ImageFiles, indices: Tensor, frame: int, boxes: Sequence[Tensor], sides: Sequence[int]
    ) -> list[Tensor]:
        """Return several times (n, side, side, 3) uint8, on the renderer's device."""
        ...


class ViewMaker:
    """Makes views of a source's images: parameters by sample, pixels by the renderer.

    Args:
        source: the images.
        renderer: one of the renderers; they take the same parameters.
        seed: the run's seed.
        stage: the stage's name; another stage draws other parameters.
        crop: "file" cuts each view's box out of the file itself, where there are files, not out of the source's images.
    """

    def __init__(
        self, source: Source, renderer: Renderer, seed: int, stage: str, crop: Literal["image", "file"] = "image"
    ) -> None:
        self.source = source
        self.renderer = renderer
        self.key: Key = stream_key(seed, stage)
        self.files = source.files if crop == "file" else None
        # Reading may go on in several threads; a renderer is in one at a time.
        self._rendering = threading.Lock()

    def __call__(
        self, view: View, images: Tensor, *, epoch: int, view_index: int, samples: Tensor | None = None
    ) -> Tensor:
        """Render one view of some images; see :meth:`render`."""
        return self.render([(view, view_index)], images, epoch=epoch, samples=samples)[0]

    def render(
        self, views: Sequence[tuple[View, int]], images: Tensor, *, epoch: int, samples: Tensor | None = None
    ) -> list[Tensor]:
        """Render several views of some images, each of which is read once.

        Args:
            views: what to make, and the number of each view, so that two views of one sample differ; an open size is
                the source's.
            images: (n,) int64 indices of the images.
            epoch: 0-based epoch.
            samples: (n,) int64 numbers that the parameters are drawn by; `images` by default. A neighbour is drawn by
                its anchor's number, so that two anchors with one neighbour do not share its view.

        Returns:
            For each view (n, 3, size, size) normalised, on the renderer's device.
        """
        numbers = images if samples is None else samples
        size = self.source.size
        views = [(view.resolved(size), number) for view, number in views]
        params = [view.sample(self.key, epoch, numbers, number, size, size) for view, number in views]
        if self.files is None:
            pixels = [self.source.read(images)] * len(views)
        else:
            boxes = [torch.stack([drawn[name] for name in _BOX], dim=1) for drawn in params]
            sides = [view.side for view, _ in views]
            if isinstance(self.renderer, DecodingRenderer):
                pixels = self.renderer.cut(self.files, images, size, boxes, sides)
            else:
                pixels = self.files.cut(images, size, boxes, sides)
            params = [_whole(drawn, view.side) for (view, _), drawn in zip(views, params, strict=True)]
        with self._rendering:
            return [self.renderer(*arguments) for arguments in zip(pixels, (v for v, _ in views), params, strict=True)]


_BOX = ("top", "left", "height", "width")


def _whole(params: Params, side: int) -> Params:
    """Return the parameters for an image that has been cut and resized already."""
    return {**params, **{name: torch.full_like(params[name], side * (i > 1)) for i, name in enumerate(_BOX)}}
