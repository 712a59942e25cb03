from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
import torch
from images import varied
from PIL import Image

from scan_fast.data import FileSource, ImagePaths, TensorSource, epoch_batches, prefetch, steps_per_epoch
from scan_fast.random import stream_key
from scan_fast.views import FusedRenderer, PlainView, SimCLRView, TorchRenderer, ViewMaker
from scan_fast.views.parameters import View

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
    """Every image is read once for all views."""

    class Counting(TensorSource):
        reads = 0

        def read(self, indices: torch.Tensor) -> torch.Tensor:
            self.reads += 1
            return super().read(indices)

    source = Counting(varied(12, 16, 16))
    make = ViewMaker(source, TorchRenderer((0.5,) * 3, (0.25,) * 3, "cpu"), seed=1, stage="pretext")
    images, samples = torch.tensor([4, 9, 4]), torch.tensor([7, 8, 9])
    views: list[tuple[View, int]] = [(SimCLRView(), 0), (SimCLRView(), 1), (PlainView(size=8), 2)]
    together = make.render(views, images, epoch=3, samples=samples)
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
    assert isinstance(stream, Generator)
    stream.close()
    assert not prefetch_threads()


def test_prefetch_runs_ahead_and_side_by_side() -> None:
    """While the consumer uses the first result, two threads compute the next two."""
    together = threading.Barrier(2)

    def meet(i: int) -> int:
        if i:
            together.wait(5)
        return i

    stream = prefetch(meet, range(3), depth=2, threads=2)
    assert next(stream) == 0
    assert list(stream) == [1, 2]


def test_ranks_share_each_batch() -> None:
    whole = list(epoch_batches(KEY, 2, 50, 8, start_step=1))
    parts = [list(epoch_batches(KEY, 2, 50, 8, start_step=1, rank=rank, world=4)) for rank in range(4)]
    assert {len(share) for part in parts for share in part} == {2}
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([part[step] for part in parts]), batch)
    with pytest.raises(ValueError, match="rank must be from 0 to world - 1, got 3 of 3"):
        next(epoch_batches(KEY, 0, 50, 8, rank=3, world=3))
    with pytest.raises(ValueError, match="a batch of 8 samples cannot be divided among 3 ranks"):
        next(epoch_batches(KEY, 0, 50, 8, rank=0, world=3))


@pytest.mark.parametrize("make_renderer", [TorchRenderer, FusedRenderer])
def test_views_cut_out_of_files(tmp_path: Path, make_renderer: type[FusedRenderer]) -> None:
    """The same region as from resized images, at the resolution of the file; compared with crops of PIL."""
    size, side = 16, 24
    for i, pixels in enumerate(varied(6, 90, 130).numpy()):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    files = [f"{i}.png" for i in range(6)]
    source = FileSource(ImagePaths(files, tmp_path), None, size, workers=2, resident=False)
    images, samples = torch.tensor([5, 0, 3]), torch.tensor([1, 2, 3])
    renderer = make_renderer((0.5,) * 3, (0.25,) * 3, "cpu")
    make = ViewMaker(source, renderer, seed=1, stage="pretext", crop="file")
    views: list[tuple[View, int]] = [(SimCLRView(size=side), 0), (PlainView(size=12), 1)]
    got = make.render(views, images, epoch=3, samples=samples)
    for (view, number), result in zip(views, got, strict=True):
        params = view.sample(make.key, 3, samples, number, size, size)
        boxes = torch.stack([params[name] for name in ("top", "left", "height", "width")], dim=1)
        for row, (top, left, height, width) in enumerate(boxes.tolist()):
            with Image.open(tmp_path / f"{images[row]}.png") as picture:
                corners = (left, top, left + width, top + height)
                box = [offset + round(90 * v / size + 1e-9) for v, offset in zip(corners, (20, 0, 20, 0), strict=True)]
                part = picture.crop((box[0], box[1], box[2], box[3])).resize(
                    (view.side, view.side), Image.Resampling.BILINEAR
                )
            own = {name: value[row : row + 1] for name, value in params.items()}
            own |= {"top": torch.tensor([0]), "left": torch.tensor([0])}
            own |= {name: torch.tensor([view.side]) for name in ("height", "width")}
            expected = renderer(torch.from_numpy(np.array(part))[None], view, own)[0]
            # PIL resizes the height first where the box is no square, which moves some levels by one; the colour
            # operations pass that on.
            difference = (result[row] - expected).abs() * 0.25 * 255
            assert float(difference.mean()) < 0.3 and float(difference.max()) <= (4 if height != width else 0.01)


def test_files_smaller_than_the_frame_can_be_cut(tmp_path: Path) -> None:
    Image.new("RGB", (3, 1), (10, 20, 30)).save(tmp_path / "x.png")
    source = FileSource(ImagePaths(["x.png"], tmp_path), None, 32, resident=False)
    boxes = torch.tensor([[31, 31, 1, 1], [0, 0, 32, 32], [0, 31, 32, 1]])
    (cut,) = source.files.cut(torch.zeros(3, dtype=torch.int64), 32, [boxes], [4])
    assert torch.equal(cut, torch.tensor([10, 20, 30], dtype=torch.uint8).expand(3, 4, 4, 3))


def test_sources_without_files_are_cut_from_memory() -> None:
    source = TensorSource(varied(4, 16, 16))
    renderer = TorchRenderer((0.5,) * 3, (0.25,) * 3, "cpu")
    makers = [ViewMaker(source, renderer, 1, "pretext", crop) for crop in ("image", "file")]
    one, two = (make(SimCLRView(), torch.arange(4), epoch=0, view_index=0) for make in makers)
    assert torch.equal(one, two)
