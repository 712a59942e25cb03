"""From numbers to batches: epoch order, views of a batch, and background threads that stay ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from .files import ImageFiles
from .random import Key, permutation, stream_key
from .sources import Source
from .views import Params, View

S = TypeVar("S")
T = TypeVar("T")

#: Turns (n, H, W, 3) uint8 images and their parameters into the (n, 3, size, size) normalised view.
Renderer = Callable[[Tensor, View, Params], Tensor]


@runtime_checkable
class DecodingRenderer(Protocol):
    """A renderer that cuts boxes out of files by itself, as :meth:`.files.ImageFiles.cut`."""

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
        """Render one view of some images; see :meth:`several`."""
        return self.several([(view, view_index)], images, epoch=epoch, samples=samples)[0]

    def several(
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


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches :func:`epoch_batches` makes of n samples."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return max(n // batch_size, min(n, 1)) if drop_last else -(-n // batch_size)


def epoch_batches(
    key: Key,
    epoch: int,
    n: int,
    batch_size: int,
    *,
    start_step: int = 0,
    drop_last: bool = True,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Tensor]:
    """Yield one epoch's batches of sample numbers, in the epoch's random order.

    Args:
        key: from :func:`~scan_fast.data.random.stream_key`.
        epoch: 0-based epoch.
        n: number of samples.
        batch_size: samples per batch. Fewer samples than this make one batch of them all, so that small sets train.
        start_step: batches to leave out at the start, for a run that goes on in mid-epoch.
        drop_last: leave out a last batch that is not full.
        rank, world: take every world-th sample of each batch, from the rank-th; what all ranks take together does not
            depend on their number.

    Yields:
        (batch_size,) int64 sample numbers on the CPU; of several ranks, each one's part.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1, got {rank} of {world}")
    steps = steps_per_epoch(n, batch_size, drop_last)
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    order = permutation(key, epoch, n)
    for step in range(start_step, steps):
        yield order[step * batch_size : (step + 1) * batch_size][rank::world]


def prefetch(function: Callable[[S], T], items: Iterable[S], *, depth: int = 3, threads: int = 2) -> Iterator[T]:
    """Yield function(item) of every item in order, computed in background threads up to `depth` ahead of the consumer.

    What the function raises is raised in the consumer, after the good results before it. When the consumer stops early
    (close, break, an exception), the threads end after what they are computing.

    This pays where the consumer waits for a device or the function for files. On a CPU that also trains, both sides'
    thread teams would wait for each other's cores; make the views of resident images in the loop there.

    Args:
        function: computes a result; two threads may be in it at once.
        items: its arguments; taken in the consumer's thread.
        depth: how many results may wait or be in the making, at least 1.
        threads: how many are computed at once: a second one decodes the files of the next batch while the first
            renders views.
    """
    if depth < 1 or threads < 1:
        raise ValueError(f"depth and threads must be at least 1, got {depth} and {threads}")
    return _prefetched(function, iter(items), depth, threads)


def _prefetched(function: Callable[[S], T], items: Iterator[S], depth: int, threads: int) -> Iterator[T]:
    pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
    try:
        coming = deque(pool.submit(function, item) for item in islice(items, depth))
        while coming:
            result = coming.popleft().result()
            coming.extend(pool.submit(function, item) for item in islice(items, 1))
            yield result
    finally:
        pool.shutdown(cancel_futures=True)
