from __future__ import annotations

from typing import Any

import pytest
import torch

from scan_fast.random import integers, permutation, philox4x32, stream_key, uniforms

# Random123's published vectors for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def philox_scalar(counter: list[int], key: list[int]) -> list[int]:
    """The generator once more, in Python's unbounded integers."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, output: str, device: str) -> None:
    k0, k1 = words(key)
    got = philox4x32((k0, k1), torch.tensor([words(counter)], device=device))
    assert got.tolist() == [words(output)]


def test_philox_equals_unbounded_integers_on_random_counters(device: str) -> None:
    counters = torch.randint(0, 2**32, (200, 4), generator=torch.Generator().manual_seed(0))
    key = stream_key(7, "pretext")
    got = philox4x32(key, counters.to(device)).tolist()
    assert got == [philox_scalar(c, list(key)) for c in counters.tolist()]


def test_stream_key_is_stable_and_tells_seeds_and_stages_apart() -> None:
    # Written down: a change of the key would silently change every run.
    assert stream_key(0, "pretext") == (0x1A54831C, 0xC5C6669A)
    keys = {stream_key(seed, stage) for seed in range(100) for stage in ("pretext", "clustering", "selflabel")}
    assert len(keys) == 300
    assert stream_key(1, "2/x") != stream_key(1, "2") != stream_key(12, "")


def test_uniforms_do_not_depend_on_the_batch(device: str) -> None:
    key = stream_key(3, "s")
    samples = torch.tensor([5, 0, 123456, 5, 2**32 - 1], device=device)
    whole = uniforms(key, 2, samples, 1, 11)
    for row, sample in enumerate(samples):
        assert torch.equal(whole[row : row + 1], uniforms(key, 2, sample.view(1), 1, 11))
    assert torch.equal(whole[:, :5], uniforms(key, 2, samples, 1, 5))
    assert torch.equal(whole.cpu(), uniforms(key, 2, samples.cpu(), 1, 11))
    assert uniforms(key, 2, samples[:0], 1, 3).shape == (0, 3)


@pytest.mark.parametrize("change", [{"epoch": 1}, {"view": 1}, {"key": stream_key(1, "s")}, {"samples": 1}])
def test_uniforms_change_with_every_argument(change: dict[str, Any]) -> None:
    base: dict[str, Any] = {"key": stream_key(0, "s"), "epoch": 0, "samples": 0, "view": 0}

    def draw(key: tuple[int, int], epoch: int, samples: int, view: int) -> torch.Tensor:
        return uniforms(key, epoch, torch.arange(64) + 64 * samples, view, 8)

    first, second = draw(**base), draw(**{**base, **change})
    assert (first == second).float().mean() < 0.01
    assert abs(float(torch.corrcoef(torch.stack((first.flatten(), second.flatten())))[0, 1])) < 0.15


def test_uniforms_are_uniform_and_below_one() -> None:
    u = uniforms(stream_key(0, "s"), 0, torch.arange(50_000), 0, 4)
    assert u.dtype == torch.float32
    assert float(u.min()) >= 0 and float(u.max()) < 1
    counts = torch.histc(u, bins=100, min=0, max=1)
    expected = u.numel() / 100
    # Chi-square with 99 degrees of freedom: mean 99, deviation 14.
    assert 50 < float(((counts - expected) ** 2 / expected).sum()) < 160
    assert float(torch.corrcoef(u.T).sub(torch.eye(4)).abs().max()) < 0.02


def test_samples_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="samples must be a 1-d int64"):
        uniforms(stream_key(0, "s"), 0, torch.arange(3, dtype=torch.int32), 0, 1)


@pytest.mark.parametrize("n", [0, 1, 2, 1000])
def test_permutation_holds_each_index_once(n: int) -> None:
    order = permutation(stream_key(0, "s"), 0, n)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(n))


def test_permutations_differ_and_are_fair() -> None:
    key = stream_key(0, "s")
    orders = torch.stack([permutation(key, epoch, 6) for epoch in range(3000)])
    assert torch.equal(orders[7], permutation(key, 7, 6))
    # Each number stands at each place a sixth of the time: 500 of 3000, deviation 20.
    counts = torch.stack([(orders == i).sum(0) for i in range(6)])
    assert int(counts.min()) > 400 and int(counts.max()) < 600


def test_integers_cover_their_range() -> None:
    key = stream_key(0, "s")
    draws = integers(key, 0, torch.arange(21_000), 0, 21)
    counts = draws.bincount(minlength=21)
    assert len(counts) == 21 and int(counts.min()) > 850 and int(counts.max()) < 1150
    high = torch.arange(1, 501)
    assert bool((integers(key, 1, torch.arange(500), 0, high) < high).all())
    assert torch.equal(integers(key, 1, torch.arange(500), 0, 1), torch.zeros(500, dtype=torch.int64))
    assert int(integers(key, 0, torch.arange(1000), 0, 2**50).max()) > 2**49


def test_integers_refuse_an_empty_range() -> None:
    with pytest.raises(ValueError, match="high must be at least 1, got 0"):
        integers(stream_key(0, "s"), 0, torch.arange(3), 0, torch.tensor([1, 0, 5]))
