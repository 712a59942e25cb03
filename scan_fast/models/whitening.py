"""A first convolution that starts from the images: filters that make their patches white.

Neighbouring pixels say nearly the same. A random first layer passes that on, and the layers behind it learn slowly
until training has undone it. Filters that decorrelate patches are known before training (Coates, Lee and Ng, AISTATS
2011, http://proceedings.mlr.press/v15/coates11a.html).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..random import Key, permutation

STEM_IMAGES = 256
"""Images of which patches are taken."""
PATCHES = 200_000
"""Patches at most."""
RIDGE = 1e-3
"""Added to each variance, relative to the mean one: hardly any signal is in the last directions."""


@torch.no_grad()
def whiten_stem(convolution: nn.Conv2d, images: Tensor, key: Key) -> None:
    """Replace the first filters of a convolution by those that whiten the patches of some images, and their negatives.

    The filters are the principal directions of the patches, each divided by the standard deviation of its direction,
    largest first. All filters, then all their negatives, take the first channels: with C channels and patches of P
    numbers, ``min(C // 2, P)`` pairs. Further channels keep their weights.

    Args:
        convolution: the first layer, of square filters and no groups.
        images: (N, channels, H, W) float, as the network sees them.
        key: of the choice of patches, if there are more than 200,000.

    Raises:
        ValueError: if the images have other channels, or are smaller than the filters.
    """
    weight = convolution.weight
    channels, side = weight.shape[1], weight.shape[2]
    if images.ndim != 4 or images.shape[1] != channels or min(images.shape[2:]) < side:
        raise ValueError(
            f"images must be (N, {channels}, H, W) of at least {side} x {side} pixels, got {tuple(images.shape)}"
        )
    patches = F.unfold(images.float().cpu().contiguous(), side).mT.flatten(0, 1)
    if len(patches) > PATCHES:
        patches = patches[permutation(key, 0, len(patches))[:PATCHES]]
    patches = patches.double()
    patches -= patches.mean(dim=0)
    variances, directions = torch.linalg.eigh(patches.mT @ patches / len(patches))
    variances, directions = variances.flip(0).clamp_min(0), directions.flip(1)
    ridge = RIDGE * variances.mean() + torch.finfo(torch.float32).tiny
    filters = (directions / (variances + ridge).sqrt()).mT.reshape(-1, channels, side, side)
    pairs = min(len(weight) // 2, len(filters))
    weight[: 2 * pairs] = torch.cat([filters[:pairs], -filters[:pairs]]).to(weight)
