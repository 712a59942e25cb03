"""Render views of a source's images: draw parameters per sample, then let a renderer compute the pixels."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from ..data.files import ImageFiles
from ..data.placement import Crop
from ..data.sources import Source
from ..random import Key, stream_key
from .parameters import Length, Params, View

#: Maps (n, H, W, 3) uint8 images, a view specification and parameters to the normalised view (n, 3, size, size).
Renderer = Callable[[Tensor, View, Params], Tensor]


@runtime_checkable
class DecodingRenderer(Protocol):
    """Renderer that crops boxes out of files itself, with the interface of ``ImageFiles.cut``."""

    def cut(
        self, files: ImageFiles, indices: Tensor, frame: int, boxes: Sequence[Tensor], sides: Sequence[int]
    ) -> list[Tensor]:
        """Return one (n, side, side, 3) uint8 tensor per side, on the renderer's device."""
        ...


class ViewMaker:
    """Render views of a source's images.

    Args:
        source: the images.
        renderer: computes the pixels; all renderers take the same parameters.
        seed: seed of the run.
        stage: name of the stage; each stage draws different parameters.
        crop: region and pixels that boxes are cut from, see ``data.crop``. Sources without files are "image".
    """

    def __init__(self, source: Source, renderer: Renderer, seed: int, stage: str, crop: Crop = "image") -> None:
        self.source = source
        self.renderer = renderer
        self.key: Key = stream_key(seed, stage)
        self.files = source.files if crop != "image" else None
        self.whole = crop == "whole"
        # Several threads may read; renderers are not thread-safe.
        self._rendering = threading.Lock()

    def __call__(
        self, view: View, images: Tensor, *, epoch: int, view_index: int, samples: Tensor | None = None
    ) -> Tensor:
        """Render one view of some images; see :meth:`render`."""
        return self.render([(view, view_index)], images, epoch=epoch, samples=samples)[0]

    def render(
        self, views: Sequence[tuple[View, int]], images: Tensor, *, epoch: int, samples: Tensor | None = None
    ) -> list[Tensor]:
        """Render several views of some images; each image is read once.

        Args:
            views: view specifications, each with its view number, so that two views of one sample differ. A size of
                None means that of the source.
            images: (n,) int64 indices of the images.
            epoch: 0-based epoch.
            samples: (n,) int64 sample numbers that key the random parameters; `images` by default. A neighbour is keyed
                by its anchor's number, so that two anchors with the same neighbour get different views.

        Returns:
            One normalised (n, 3, size, size) tensor per view, on the renderer's device.
        """
        numbers = images if samples is None else samples
        size = self.source.size
        views = [(view.resolved(size), number) for view, number in views]
        lengths: tuple[Length, Length] = (size, size)
        if self.whole and self.files is not None:
            lengths = self.files.whole_sizes(images, size)
        params = [view.sample(self.key, epoch, numbers, number, *lengths) for view, number in views]
        if self.files is None:
            pixels = [self.source.read(images)] * len(views)
        else:
            boxes = [torch.stack([drawn[name] for name in _BOX], dim=1) for drawn in params]
            sides = [view.side for view, _ in views]
            if self.whole:
                pixels = self.files.cut_whole(images, size, boxes, sides)
            elif isinstance(self.renderer, DecodingRenderer):
                pixels = self.renderer.cut(self.files, images, size, boxes, sides)
            else:
                pixels = self.files.cut(images, size, boxes, sides)
            params = [_whole(drawn, view.side) for (view, _), drawn in zip(views, params, strict=True)]
        with self._rendering:
            return [self.renderer(*arguments) for arguments in zip(pixels, (v for v, _ in views), params, strict=True)]


_BOX = ("top", "left", "height", "width")


def _whole(params: Params, side: int) -> Params:
    """Return the parameters with a box that covers the whole image, for images that are already cropped and resized."""
    return {**params, **{name: torch.full_like(params[name], side * (i > 1)) for i, name in enumerate(_BOX)}}
