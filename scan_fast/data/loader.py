"""From numbers to batches: epoch order, views of a batch, and a background thread that stays ahead."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from torch import Tensor

from .random import Key, permutation, stream_key
from .sources import Source
from .views import Params, View

T = TypeVar("T")

#: Turns (n, H, W, 3) uint8 images and their parameters into the (n, 3, size, size) normalised view.
Renderer = Callable[[Tensor, View, Params], Tensor]


class ViewMaker:
    """Makes views of a source's images: parameters by sample, pixels by the renderer.

    Args:
        source: the images.
        renderer: one of the renderers; they take the same parameters.
        seed: the run's seed.
        stage: the stage's name; another stage draws other parameters.
    """

    def __init__(self, source: Source, renderer: Renderer, seed: int, stage: str) -> None:
        self.source = source
        self.renderer = renderer
        self.key: Key = stream_key(seed, stage)

    def __call__(
        self, view: View, images: Tensor, *, epoch: int, view_index: int, samples: Tensor | None = None
    ) -> Tensor:
        """Render one view of some images.

        Args:
            view: what to make; an open size is the source's.
            images: (n,) int64 indices of the images.
            epoch: 0-based epoch.
            view_index: number of the view, so that two views of one sample differ.
            samples: (n,) int64 numbers that the parameters are drawn by; `images` by default. A neighbour is drawn by
                its anchor's number, so that two anchors with one neighbour do not share its view.

        Returns:
            (n, 3, size, size) normalised, on the renderer's device.
        """
        view = view.resolved(self.source.size)
        numbers = images if samples is None else samples
        params = view.sample(self.key, epoch, numbers, view_index, self.source.size, self.source.size)
        return self.renderer(self.source.read(images), view, params)


def steps_per_epoch(n: int, batch_size: int, drop_last: bool = True) -> int:
    """Return the number of batches :func:`epoch_batches` makes of n samples."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return max(n // batch_size, min(n, 1)) if drop_last else -(-n // batch_size)


def epoch_batches(
    key: Key, epoch: int, n: int, batch_size: int, *, start_step: int = 0, drop_last: bool = True
) -> Iterator[Tensor]:
    """Yield one epoch's batches of sample numbers, in the epoch's random order.

    Args:
        key: from :func:`~scan_fast.data.random.stream_key`.
        epoch: 0-based epoch.
        n: number of samples.
        batch_size: samples per batch. Fewer samples than this make one batch of them all, so that small sets train.
        start_step: batches to leave out at the start, for a run that goes on in mid-epoch.
        drop_last: leave out a last batch that is not full.

    Yields:
        (batch_size,) int64 sample numbers on the CPU.
    """
    steps = steps_per_epoch(n, batch_size, drop_last)
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    order = permutation(key, epoch, n)
    for step in range(start_step, steps):
        yield order[step * batch_size : (step + 1) * batch_size]


class _End:
    """Travels behind the last item; carries what the producer raised."""

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


def prefetch(items: Iterator[T], depth: int = 2) -> Iterator[T]:
    """Compute items in a background thread, up to `depth` ahead of the consumer.

    What the producer raises is raised in the consumer. When the consumer stops early (close, break, an exception), the
    thread ends after the item that it is computing.

    This pays where the consumer waits for a device. On a CPU that also trains, both sides' thread teams would wait for
    each other's cores; make the views in the loop there.

    Args:
        items: the iterator to run; only the thread touches it.
        depth: how many finished items may wait, at least 1.
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1, got {depth}")
    return _prefetched(items, depth)


def _prefetched(items: Iterator[T], depth: int) -> Iterator[T]:
    ready: queue.SimpleQueue[T | _End] = queue.SimpleQueue()
    stopped = threading.Event()
    # One permit per item that is being computed or waits; the consumer gives it back when it takes the item.
    room = threading.Semaphore(depth)

    def produce() -> None:
        iterator = iter(items)
        end = _End()
        try:
            while True:
                room.acquire()
                if stopped.is_set():
                    break
                try:
                    ready.put(next(iterator))
                except StopIteration:
                    break
            close = getattr(iterator, "close", None)
            if close is not None:
                close()
        except BaseException as error:
            end = _End(error)
        ready.put(end)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            room.release()
            yield item
    finally:
        stopped.set()
        room.release()
        thread.join()
