"""Normalisation of pixel values, the last step of every renderer."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ConfigError


def scale_and_shift(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return scale and shift per channel: a pixel value 0..255 is normalised as ``value * scale + shift``.

    Args:
        mean, std: per-channel normalisation in [0, 1].

    Raises:
        ConfigError: unless there are 3 values each and every std is above 0.
    """
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ConfigError(f"mean and std must be 3 numbers each, std above 0, got {tuple(mean)} and {tuple(std)}")
    scale = [1 / (255 * float(value)) for value in std]
    return scale, [-float(m) / float(s) for m, s in zip(mean, std, strict=True)]
