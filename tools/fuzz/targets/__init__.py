"""All targets by name."""

from __future__ import annotations

from ..target import Target
from . import artifacts, configurations, containers, folders, images, names, weights

_ALL: tuple[type[Target], ...] = (
    configurations.Values,
    configurations.Overrides,
    configurations.YamlFiles,
    configurations.Plans,
    configurations.CommandLines,
    *artifacts.LOADERS,
    images.Decoding,
    images.Folder,
    *containers.CONTAINERS,
    weights.WeightFiles,
    weights.Models,
    names.FileNames,
    names.GroupWords,
    folders.Commands,
)
TARGETS: dict[str, type[Target]] = {target.name: target for target in _ALL}
