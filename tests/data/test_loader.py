from __future__ import annotations

import itertools
import threading
import time

import pytest
import torch
from images import varied

from scan_fast.data import (
    PlainView,
    SimCLRView,
    TensorSource,
    TorchRenderer,
    ViewMaker,
    epoch_batches,
    prefetch,
    steps_per_epoch,
)
from scan_fast.data.random import stream_key

KEY = stream_key(0, "pretext")


@pytest.mark.parametrize(
    ("n", "batch_size", "full", "all_"),
    [(10, 3, 3, 4), (9, 3, 3, 3), (2, 5, 1, 1), (5, 5, 1, 1), (0, 4, 0, 0), (1, 1, 1, 1)],
)
def test_steps_agree_with_the_batches(n: int, batch_size: int, full: int, all_: int) -> None:
    for drop_last, steps in ((True, full), (False, all_)):
        batches = list(epoch_batches(KEY, 0, n, batch_size, drop_last=drop_last))
        assert len(batches) == steps == steps_per_epoch(n, batch_size, drop_last)
        drawn = torch.cat(batches) if batches else torch.empty(0, dtype=torch.int64)
        assert len(drawn.unique()) == len(drawn)
        if not drop_last or n <= batch_size:
            assert torch.equal(drawn.sort().values, torch.arange(n))
        else:
            assert all(len(batch) == batch_size for batch in batches)


def test_an_epoch_resumes_where_it_stopped() -> None:
    whole = list(epoch_batches(KEY, 3, 100, 7))
    for step in (0, 1, 13, 14):
        rest = list(epoch_batches(KEY, 3, 100, 7, start_step=step))
        assert len(rest) == len(whole) - step
        assert all(torch.equal(a, b) for a, b in zip(rest, whole[step:], strict=True))
    assert not torch.equal(whole[0], next(epoch_batches(KEY, 4, 100, 7)))


def test_wrong_steps_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        steps_per_epoch(10, 0)
    with pytest.raises(ValueError, match="start_step must not be negative"):
        next(epoch_batches(KEY, 0, 10, 2, start_step=-1))
    with pytest.raises(ValueError, match="depth and threads must be at least 1"):
        prefetch(abs, [1], depth=0)


def test_view_maker_draws_by_sample_and_shows_the_image() -> None:
    source = TensorSource(varied(30, 16, 16))
    make = ViewMaker(source, TorchRenderer((0.5,) * 3, (0.25,) * 3, "cpu"), seed=1, stage="clustering")
    images = torch.tensor([4, 9, 4])
    plain = make(PlainView(), images, epoch=0, view_index=0)
    expected = (source.read(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    torch.testing.assert_close(plain, expected, rtol=0, atol=3e-6)
    first = make(SimCLRView(), images, epoch=0, view_index=0)
    # One image twice in a batch has one view; another sample number or view gives it another.
    assert torch.equal(first[0], first[2])
    samples = torch.tensor([0, 1, 2])
    by_anchor = make(SimCLRView(), images, epoch=0, view_index=0, samples=samples)
    assert not torch.equal(by_anchor[0], by_anchor[2])
    assert not torch.equal(first, make(SimCLRView(), images, epoch=0, view_index=1))
    assert not torch.equal(first, make(SimCLRView(), images, epoch=1, view_index=0))
    # A resumed run draws the same: nothing is kept between calls.
    again = ViewMaker(source, TorchRenderer((0.5,) * 3, (0.25,) * 3, "cpu"), seed=1, stage="clustering")
    assert torch.equal(first, again(SimCLRView(), images, epoch=0, view_index=0))


def test_several_views_are_those_that_are_made_alone() -> None:
    """And every image is read once for all of them."""

    class Counting(TensorSource):
        reads = 0

        def read(self, indices: torch.Tensor) -> torch.Tensor:
            self.reads += 1
            return super().read(indices)

    source = Counting(varied(12, 16, 16))
    make = ViewMaker(source, TorchRenderer((0.5,) * 3, (0.25,) * 3, "cpu"), seed=1, stage="pretext")
    images, samples = torch.tensor([4, 9, 4]), torch.tensor([7, 8, 9])
    views = [(SimCLRView(), 0), (SimCLRView(), 1), (PlainView(size=8), 2)]
    together = make.several(views, images, epoch=3, samples=samples)
    assert source.reads == 1 and [view.shape[-1] for view in together] == [16, 16, 8]
    for (view, number), got in zip(views, together, strict=True):
        assert torch.equal(got, make(view, images, epoch=3, view_index=number, samples=samples))


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize(("depth", "threads"), [(1, 1), (3, 2), (2, 4)])
def test_prefetch_keeps_the_order_and_the_limit(depth: int, threads: int) -> None:
    begun: list[int] = []

    def square(i: int) -> int:
        begun.append(i)
        time.sleep(0.004 * (i % 3 == 0))  # so that the second thread overtakes the first
        return i * i

    taken = []
    for result in prefetch(square, range(20), depth=depth, threads=threads):
        taken.append(result)
        time.sleep(0.002)
        assert len(begun) <= len(taken) + depth
    assert taken == [i * i for i in range(20)]
    assert not prefetch_threads()


def test_prefetch_raises_in_the_consumer_after_the_good_items() -> None:
    def fragile(i: int) -> int:
        if i == 2:
            raise KeyError("broken")
        return i

    taken = []
    with pytest.raises(KeyError, match="broken"):
        for item in prefetch(fragile, range(5)):
            taken.append(item)
    assert taken == [0, 1]
    assert not prefetch_threads()


def test_prefetch_ends_its_threads_when_the_consumer_stops() -> None:
    stream = prefetch(abs, itertools.count())
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert not prefetch_threads()


def test_prefetch_runs_ahead_and_side_by_side() -> None:
    """While the first result is in use the next two are being made, at the same time."""
    together = threading.Barrier(2)

    def meet(i: int) -> int:
        if i:
            together.wait(5)
        return i

    stream = prefetch(meet, range(3), depth=2, threads=2)
    assert next(stream) == 0
    assert list(stream) == [1, 2]
