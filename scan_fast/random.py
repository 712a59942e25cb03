"""Randomness as a function: every draw is Philox4x32-10 of (key, sample, view, epoch, block).

Nothing here keeps a state. A draw depends on its counter alone, so the batch that a sample falls in, the number of
workers, the device and an interruption change nothing. The generator is that of Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011): a 128-bit counter of four 32-bit words goes through ten rounds under a 64-bit
key. The words are held in int64 tensors; a 32 x 32 bit product then wraps in 64 bits, and its high and low halves are
read with a shift and a mask, so the same bits come out on every device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

Key = tuple[int, int]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

# The block word carries the kind of draw in its two highest bits, so that uniforms, integers and permutations of one
# (sample, view, epoch) never share a counter.
_UNIFORM_BLOCK = 0
_INTEGER_BLOCK = 0x40000000
_PERMUTATION_BLOCK = 0x80000000
_NORMAL_BLOCK = 0xC0000000


def stream_key(seed: int, stage: str) -> Key:
    """Return the Philox key of one stage of one run: 64 bits of BLAKE2b over the seed and the stage's name."""
    digest = hashlib.blake2b(f"{int(seed)}/{stage}".encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def philox4x32(key: Key, counter: Tensor) -> Tensor:
    """Apply Philox4x32-10.

    Args:
        key: two 32-bit words.
        counter: (..., 4) int64, each entry a 32-bit word in [0, 2^32).

    Returns:
        (..., 4) int64 random words in [0, 2^32), on the counter's device.
    """
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        # The product may have wrapped to a negative number: the mask turns the arithmetic shift into a logical one.
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


def _words(key: Key, epoch: int | Tensor, samples: Tensor, view: int, first_block: int, blocks: int) -> Tensor:
    """Return (n, 4 * blocks) random words of the given samples."""
    if samples.dtype != torch.int64 or samples.ndim != 1:
        raise ValueError(f"samples must be a 1-d int64 tensor, got {tuple(samples.shape)} {samples.dtype}")
    n = samples.numel()
    counter = samples.new_empty((n, blocks, 4))
    counter[..., 0] = (samples & _MASK).unsqueeze(1)
    counter[..., 1] = view & _MASK
    counter[..., 2] = epoch & _MASK
    counter[..., 3] = first_block + torch.arange(blocks, device=samples.device)
    return philox4x32(key, counter).view(n, 4 * blocks)


def _fraction53(high: Tensor, low: Tensor) -> Tensor:
    """Turn two 32-bit words into a float64 multiple of 2^-53 in [0, 1)."""
    return ((high >> 5) * (1 << 26) + (low >> 6)).to(torch.float64) * 2.0**-53


def uniforms(key: Key, epoch: int, samples: Tensor, view: int, count: int) -> Tensor:
    """Draw `count` uniforms for each sample.

    Args:
        key: from :func:`stream_key`.
        epoch: 0-based epoch.
        samples: (n,) int64 global sample numbers in [0, 2^32).
        view: number of the view.
        count: draws per sample; a longer draw starts with the same numbers as a shorter one.

    Returns:
        (n, count) float32 multiples of 2^-24 in [0, 1), on the samples' device.
    """
    words = _words(key, epoch, samples, view, _UNIFORM_BLOCK, -(-count // 4))[:, :count]
    return (words >> 8).to(torch.float32) * 2.0**-24


def normals(key: Key, step: Tensor, rows: int, columns: int) -> Tensor:
    """Draw standard normal numbers for a step that is counted on a device; the host does not wait for it.

    Args:
        key: from :func:`stream_key`.
        step: int64 scalar in [0, 2^32).
        rows: number of rows.
        columns: number of columns.

    Returns:
        (rows, columns) float32, by the Box-Muller transform of 32-bit words, on the step's device.
    """
    words = _words(key, step, torch.arange(rows, device=step.device), 0, _NORMAL_BLOCK, -(-columns // 4))
    first, second = ((words + 0.5) * 2.0**-32).to(torch.float32).chunk(2, dim=1)
    radius, angle = (-2 * first.clamp(max=1 - 2.0**-24).log()).sqrt(), 2 * math.pi * second
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=1)[:, :columns]


def permutation(key: Key, epoch: int, n: int) -> Tensor:
    """Return a random order of range(n), int64 on the CPU: the argsort of 64-bit random words, ties by index."""
    keys = torch.empty(n, dtype=torch.int64)
    for start in range(0, n, 1 << 16):  # the words take fifteen times the memory of the keys
        samples = torch.arange(start, min(start + (1 << 16), n))
        words = _words(key, epoch, samples, 0, _PERMUTATION_BLOCK, 1)
        keys[start : start + len(samples)] = (words[:, 0] << 32) | words[:, 1]
    return torch.argsort(keys, stable=True)


def integers(key: Key, epoch: int, samples: Tensor, view: int, high: int | Tensor) -> Tensor:
    """Draw one integer in [0, high) for each sample.

    Args:
        key: from :func:`stream_key`.
        epoch: 0-based epoch.
        samples: (n,) int64 global sample numbers in [0, 2^32).
        view: number of the view.
        high: exclusive bound, at least 1, for all samples or (n,) for each.

    Returns:
        (n,) int64; a 53-bit fraction is scaled, so the bias is below high / 2^53.

    Raises:
        ValueError: if a bound is below 1.
    """
    bound = torch.as_tensor(high, dtype=torch.int64, device=samples.device)
    if bound.numel() and int(bound.min()) < 1:
        raise ValueError(f"high must be at least 1, got {int(bound.min())}")
    words = _words(key, epoch, samples, view, _INTEGER_BLOCK, 1)
    return torch.minimum((_fraction53(words[:, 0], words[:, 1]) * bound).to(torch.int64), bound - 1)
