from __future__ import annotations

import threading
import time
from collections.abc import Iterator

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
    with pytest.raises(ValueError, match="depth must be at least 1"):
        prefetch(iter([1]), 0)


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


def prefetch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.mark.parametrize("depth", [1, 3])
def test_prefetch_keeps_the_order_and_the_limit(depth: int) -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    taken = []
    for item in prefetch(items(), depth):
        taken.append(item)
        time.sleep(0.002)
        assert len(made) <= len(taken) + depth
    assert taken == list(range(20))
    assert not prefetch_threads()


def test_prefetch_raises_in_the_consumer_after_the_good_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise KeyError("broken")

    taken = []
    with pytest.raises(KeyError, match="broken"):
        for item in prefetch(items()):
            taken.append(item)
    assert taken == [1, 2]
    assert not prefetch_threads()


def test_prefetch_ends_its_thread_and_closes_its_items_when_the_consumer_stops() -> None:
    closed = threading.Event()

    def endless() -> Iterator[int]:
        try:
            i = 0
            while True:
                yield i
                i += 1
        finally:
            closed.set()

    stream = prefetch(endless())
    assert [next(stream), next(stream)] == [0, 1]
    stream.close()
    assert closed.wait(5)
    assert not prefetch_threads()


def test_prefetch_runs_ahead_of_the_consumer() -> None:
    """The second item is being made while the first is in use."""
    started = threading.Event()

    def items() -> Iterator[int]:
        yield 0
        started.set()
        yield 1

    stream = prefetch(items(), 1)
    assert next(stream) == 0
    assert started.wait(5)
    assert list(stream) == [1]
