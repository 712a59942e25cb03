"""Epochs that read shards one after another: nothing is lost or read twice, for any number of ranks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scan_fast.data.order import MOST_LANES, check_ranks, epoch_order, lanes_of
from scan_fast.errors import ConfigError
from scan_fast.random import stream_key

KEY = stream_key(3, "pretext")

UNEVEN = torch.arange(40).repeat_interleave((torch.arange(40) * 7919) % 97 + 1)
"""Shards of 1 to 97 images."""

CASES = [
    (UNEVEN, 256),
    (UNEVEN[torch.randperm(len(UNEVEN), generator=torch.Generator().manual_seed(0))] * 10 - 5, 96),
    (torch.arange(50).repeat_interleave(100), 250),
    (torch.arange(3).repeat_interleave(1000), 64),
    (torch.arange(700), 64),
    (torch.zeros(500, dtype=torch.int64), 128),
    (UNEVEN, 7),
    (torch.arange(8).repeat_interleave(8), 64),
]


@pytest.mark.parametrize(("groups", "batch_size"), CASES)
def test_an_epoch_has_every_image_once_but_an_incomplete_batch(groups: Tensor, batch_size: int) -> None:
    n = len(groups)
    orders = [epoch_order(KEY, epoch, groups, batch_size) for epoch in range(4)]
    for order in orders:
        assert order.dtype == torch.int64 and len(order) == n // batch_size * batch_size
        assert len(order.unique()) == len(order) and int(order.min()) >= 0 and int(order.max()) < n
    assert all(not torch.equal(orders[0], other) for other in orders[1:])
    if 0 < n % batch_size < n // 2:
        left_out = [frozenset(range(n)).difference(order.tolist()) for order in orders]
        assert len(set(left_out)) == len(left_out)
    assert torch.equal(orders[1], epoch_order(KEY, 1, groups, batch_size))
    other_seed = epoch_order(stream_key(4, "pretext"), 0, groups, batch_size)
    assert not torch.equal(orders[0], other_seed)


@pytest.mark.parametrize(
    ("groups", "batch_size", "world"),
    [(*case, world) for case in CASES for world in (1, 2, 4) if lanes_of(case[1]) % world == 0],
)
def test_a_shard_is_read_by_one_rank_but_at_the_borders(groups: Tensor, batch_size: int, world: int) -> None:
    batches = epoch_order(KEY, 2, groups, batch_size).view(-1, world, batch_size // world)
    readers: dict[int, set[int]] = {}
    for rank in range(world):
        for shard in groups[batches[:, rank].reshape(-1)].unique().tolist():
            readers.setdefault(shard, set()).add(rank)
    # Between two neighbouring ranks there is one border, which may cut one shard.
    assert sum(len(ranks) - 1 for ranks in readers.values()) <= world - 1


def test_a_lane_reads_a_few_shards_at_a_time_and_leaves_them_for_good() -> None:
    groups, batch_size, lanes, window = torch.arange(200).repeat_interleave(30), 64, 8, 3
    order = epoch_order(KEY, 0, groups, batch_size, lanes, window)
    for lane in order.view(-1, lanes, batch_size // lanes).transpose(0, 1).reshape(lanes, -1):
        shards = groups[lane].tolist()
        first = {shard: shards.index(shard) for shard in shards}
        last = {shard: len(shards) - 1 - shards[::-1].index(shard) for shard in shards}
        open_at_once = [sum(first[s] <= step <= last[s] for s in first) for step in range(len(shards))]
        assert max(open_at_once) == window
        # Their images are mixed, and not in the order of the file.
        rows = lane[: window * 20]
        assert not torch.equal(rows, rows.sort().values) and len({*shards[:12]}) == window


def test_images_follow_no_pattern_over_epochs() -> None:
    """Each image is left out about equally often, and any two shards meet in a batch of some epoch."""
    groups, batch_size, epochs = torch.arange(20).repeat_interleave(5), 32, 300
    counts = torch.zeros(100)
    met = torch.zeros(20, 20, dtype=torch.bool)
    for epoch in range(epochs):
        order = epoch_order(KEY, epoch, groups, batch_size, 4, 2)
        counts[order] += 1
        shards = groups[order[:batch_size]].unique()
        met[shards.unsqueeze(1), shards] = True
    expected = 0.96 * epochs
    deviation = math.sqrt(epochs * 0.96 * 0.04)
    assert (counts - expected).abs().max() < 5 * deviation
    assert met.all()


def test_few_images_form_one_batch() -> None:
    order = epoch_order(KEY, 0, torch.tensor([0, 0, 1, 1, 1]), 64)
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    assert len(epoch_order(KEY, 0, torch.empty(0, dtype=torch.int64), 64)) == 0


@pytest.mark.parametrize(
    ("batch_size", "lanes"),
    [(1, 1), (7, 7), (32, 32), (64, 64), (96, 48), (100, 20), (128, 64), (250, 50), (256, 64), (1000, 40), (67, 1)],
)
def test_lanes_depend_on_the_batch_alone(batch_size: int, lanes: int) -> None:
    assert lanes_of(batch_size) == lanes and batch_size % lanes == 0 and lanes <= MOST_LANES


def test_ranks_must_divide_the_lanes() -> None:
    for batch_size in (64, 256, 1000):
        for world in (1, 2, 4, 8):
            check_ranks(batch_size, world)
    with pytest.raises(ConfigError, match=r"pretext\.batch_size=1000 makes 40 lanes .*16 ranks.*=992, or"):
        check_ranks(1000, 16, "pretext.batch_size")
    check_ranks(992, 32)
    with pytest.raises(ConfigError, match=r"65 ranks cannot divide; set data\.shuffle=images$"):
        check_ranks(65, 65)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": torch.zeros(4)}, r"groups must be \(N,\) int64, got \(4,\) torch\.float32"),
        ({"lanes": 3}, "lanes must be a divisor of batch_size=4, got 3"),
        ({"lanes": 0}, "lanes must be a divisor of batch_size=4, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_orders_are_refused(changes: dict[str, object], message: str) -> None:
    given = {"groups": torch.zeros(9, dtype=torch.int64), "batch_size": 4, **changes}
    with pytest.raises(ValueError, match=message):
        epoch_order(KEY, 0, **given)  # type: ignore[arg-type]
