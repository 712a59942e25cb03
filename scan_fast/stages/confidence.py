"""Confident images of a batch: those above a threshold, and the most confident of each class."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import distributed
from ..ops.collectives import all_gather

CERTAIN = 0.5
"""The threshold for what :func:`per_class` returns: images that count are at 1, the others at 1 / C."""


@torch.no_grad()
def per_class(weak: Tensor, threshold: float, fraction: float) -> Tensor:
    """Return logits that are certain of the confident images and of nothing else.

    An image is confident if its largest probability is strictly above the threshold, or if it is among the most
    confident of those with the same predicted class (as in CDC, ICLR 2025, which takes the latter alone). With several
    ranks these are compared with the rows of all ranks, each of which has as many. Shapes are static, and nothing waits
    for the device.

    Args:
        weak: (B, C) logits of a batch, or of this rank's rows of it, C at least 2.
        threshold: in [0, 1].
        fraction: share of each predicted class that is confident in any case, in (0, 1], rounded up.

    Returns:
        (B, C) float32: the first largest class of a confident image has probability 1, and all classes of another
        image have 1 / C. With the threshold :data:`CERTAIN`, ``self_label_loss`` takes exactly the confident images.
    """
    confidence, target = weak.float().softmax(dim=1).max(dim=1)
    confidences, targets, first = confidence, target, 0
    if distributed.several():
        # Numbers of classes are exact in float32.
        everyone = all_gather(torch.stack([confidence, target.float()]))
        confidences, targets = everyone[:, 0].flatten(), everyone[:, 1].flatten().long()
        first = distributed.current().rank * len(weak)
    number = torch.arange(len(confidences), device=weak.device)
    above = confidences > confidence[:, None]
    before = (confidences == confidence[:, None]) & (number < number[first : first + len(weak), None])
    same = targets == target[:, None]
    rank = (same & (above | before)).sum(dim=1)
    confident = (rank < (fraction * same.sum(dim=1)).ceil()) | (confidence > threshold)
    certain = 100.0 * F.one_hot(target, weak.shape[1]).float()
    return torch.where(confident[:, None], certain, torch.zeros_like(certain))
