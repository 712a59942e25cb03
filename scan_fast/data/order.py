"""Order of an epoch that reads shards one after another, the same for any number of ranks.

The images of an epoch are divided among lanes. A lane has whole shards, such as tar files, one after another, and mixes
the images of a few neighbouring ones. A batch takes equally many images from each lane. So a rank that has some of the
lanes reads its own shards only, and reads each of them in one stretch of the epoch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import ConfigError
from ..random import Key, permutation

MOST_LANES = 64
"""Largest number of lanes, and so of ranks that can share the shards."""
WINDOW = 2
"""Number of neighbouring shards of a lane whose images are mixed."""

_SHARDS = 0x9E3779B9
"""Added to the key of an epoch's images for the order of its shards."""


def lanes_of(batch_size: int) -> int:
    """Return the number of lanes: a divisor of the batch size, at most 64.

    Of these it is the largest that 8 ranks can divide, or else 4 or 2, if they can divide the batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    wanted = math.gcd(batch_size, 8)
    return max(n for n in range(wanted, MOST_LANES + 1, wanted) if batch_size % n == 0)


def check_ranks(batch_size: int, world: int, setting: str = "batch_size") -> None:
    """Check that ranks can share the lanes of a batch.

    Args:
        batch_size: images in a batch of all ranks together.
        world: number of ranks.
        setting: the name of the batch size, for the error.

    Raises:
        ConfigError: if the number of ranks does not divide the number of lanes.
    """
    lanes = lanes_of(batch_size)
    if lanes % world:
        near = (batch_size + sign * step for step in range(1, 8 * MOST_LANES) for sign in (-1, 1))
        fitting = next((size for size in near if size > 0 and lanes_of(size) % world == 0), None)
        advice = "set data.shuffle=images" if fitting is None else f"set {setting}={fitting}, or data.shuffle=images"
        raise ConfigError(
            f"data.shuffle=shards with {setting}={batch_size} makes {lanes} lanes of shards, which {world} ranks "
            f"cannot divide; {advice}"
        )


def epoch_order(
    key: Key, epoch: int, groups: Tensor, batch_size: int, lanes: int | None = None, window: int = WINDOW
) -> Tensor:
    """Return the images of an epoch in the order in which they are read.

    The shards are put in a random order and cut into lanes of equal numbers of images, so at most ``lanes - 1`` shards
    belong to two lanes. Within a lane, the images of each `window` consecutive shards are in random order. What is left
    over for an incomplete last batch, fewer than ``batch_size`` images, is taken from the ends of the lanes. It differs
    between epochs.

    Args:
        key: from :func:`~scan_fast.random.stream_key`.
        epoch: 0-based epoch.
        groups: (N,) int64 number of the shard of each image; any numbers.
        batch_size: images in a batch of all ranks together. Fewer images than this form one batch, in random order.
        lanes: number of lanes, a divisor of the batch size; :func:`lanes_of` by default.
        window: number of shards whose images are mixed, at least 1.

    Returns:
        (steps * batch_size,) int64 image numbers, without repeats. Each slice of `batch_size` is a batch. In it each
        slice of ``batch_size / lanes`` is of one lane. So rank r of R takes the r-th of R equal parts of a batch, if R
        divides `lanes`.

    Raises:
        ValueError: if groups are not (N,) int64, the lanes do not divide the batch, or the window is below 1.
    """
    if groups.ndim != 1 or groups.dtype != torch.int64:
        raise ValueError(f"groups must be (N,) int64, got {tuple(groups.shape)} {groups.dtype}")
    lanes = lanes_of(batch_size) if lanes is None else lanes
    if lanes < 1 or batch_size < 1 or batch_size % lanes:
        raise ValueError(f"lanes must be a divisor of batch_size={batch_size}, got {lanes}")
    if window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    n = len(groups)
    chance = permutation(key, epoch, n)
    if n < batch_size:
        return chance
    numbers, shard = groups.unique(return_inverse=True)
    place = torch.empty(len(numbers), dtype=torch.int64)
    place[permutation((key[0] ^ _SHARDS, key[1]), epoch, len(numbers))] = torch.arange(len(numbers))
    # Images of one shard keep their order here, so that two lanes read different parts of a shard that they share.
    rows = torch.argsort(place[shard], stable=True)
    places = place[shard[rows]]
    bounds = torch.tensor([n * lane // lanes for lane in range(lanes + 1)])
    lane = torch.searchsorted(bounds[1:], torch.arange(n), right=True)
    block = (places - places[bounds[:-1]][lane]) // window
    mixed = rows[torch.argsort((lane * len(numbers) + block) * n + chance[rows])]
    steps, each = n // batch_size, batch_size // lanes
    kept = torch.stack([mixed[start : start + steps * each] for start in bounds[:-1].tolist()])
    return kept.view(lanes, steps, each).transpose(0, 1).reshape(-1)
