"""CIFAR-10, and CIFAR-100 with its superclasses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..decode_cache import DecodeCache
from .kind import Opened, SourceKind
from .torchvision import array_source, open_torchvision

if TYPE_CHECKING:
    from ..config import DataConfig

#: Superclass of each of CIFAR-100's 100 fine labels, in the data set's own numbering.
CIFAR20_COARSE = (
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11,
    6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5,
    5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17,
    10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13,
    16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
)  # fmt: skip
CIFAR20_NAMES = (
    "aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables",
    "household_electrical_devices", "household_furniture", "insects", "large_carnivores",
    "large_man-made_outdoor_things", "large_natural_outdoor_scenes", "large_omnivores_and_herbivores",
    "medium_mammals", "non-insect_invertebrates", "people", "reptiles", "small_mammals", "trees", "vehicles_1",
    "vehicles_2",
)  # fmt: skip


def _open_cifar10(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    train, test = (open_torchvision("CIFAR10", config, train=part) for part in (True, False))
    return Opened(
        array_source("train", train.data, train.targets, train.classes, config),
        array_source("test", test.data, test.targets, test.classes, config),
    )


def _open_cifar20(config: DataConfig, decode_cache: DecodeCache | None) -> Opened:
    """Open CIFAR-100 with its 20 superclasses."""
    coarse = np.array(CIFAR20_COARSE)
    train, test = (open_torchvision("CIFAR100", config, train=part) for part in (True, False))
    return Opened(
        array_source("train", train.data, coarse[train.targets], CIFAR20_NAMES, config),
        array_source("test", test.data, coarse[test.targets], CIFAR20_NAMES, config),
    )


# The statistics that the SCAN reference normalizes with.
CIFAR10 = SourceKind("cifar10", _open_cifar10, ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)))
CIFAR20 = SourceKind("cifar20", _open_cifar20, ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)))
