"""Writes weight files of the original SCAN project: its names, its structure, for its code to load."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from ..errors import WeightsError
from .backbones import ModelConfig

Stage = Literal["pretext", "clustering", "selflabel"]

BACKBONES = ("resnet18_cifar", "resnet18_stl", "resnet50")


def check_writable(model: ModelConfig, stage: Stage) -> None:
    """Refuse a network that the original project does not have.

    Args:
        model: its settings, with ``backbone: auto`` resolved.
        stage: the stage whose result is to be written.

    Raises:
        WeightsError: says which setting it is.
    """
    wrong: list[str] = []
    if model.backbone not in BACKBONES:
        wrong.append(f"model.backbone={model.backbone} (it has {', '.join(BACKBONES)})")
    elif model.width != 1.0:
        wrong.append(f"model.width={model.width:g} (it has 1)")
    if stage == "pretext":
        if model.projector == "mlp_bn":
            wrong.append("model.projector=mlp_bn (it has mlp and linear)")
        n_features = 2048 if model.backbone == "resnet50" else 512
        if model.projector == "mlp" and model.hidden_dim not in (None, n_features):
            wrong.append(f"model.hidden_dim={model.hidden_dim} (it has the backbone's {n_features})")
    else:
        if model.cluster_head != "linear":
            wrong.append(f"model.cluster_head={model.cluster_head} (it has linear)")
        if model.unit_features:
            wrong.append("heads on features of length one (model.unit_features, clustering.update=features)")
    if wrong:
        raise WeightsError(f"the SCAN project has no such network: {'; '.join(wrong)}")


def dump_original(
    file: BinaryIO, stage: Stage, model: ModelConfig, state_dict: Mapping[str, Tensor], head: int = 0
) -> None:
    """Write a ``model.pth.tar`` of the original project.

    A pretext or self-label file is a state dict, a file of the clustering stage ``{"model", "head"}``. It is in the
    older format of torch.save, since the original project's PyTorch 1.4 cannot read today's. Today's reads both, with
    ``weights_only=True``.

    Args:
        file: to write to.
        stage: whose result it is.
        model: the settings of the network.
        state_dict: ``backbone.*`` with ``contrastive_head.*`` (pretext) or ``cluster_head.{h}.*``.
        head: the best head, for the clustering stage.

    Raises:
        WeightsError: as :func:`check_writable`.
    """
    check_writable(model, stage)
    # Plain memory layout: the original project's PyTorch is older than channels-last weights.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in state_dict.items()}
    content: dict[str, Any] = {"model": tensors, "head": int(head)} if stage == "clustering" else tensors
    torch.save(content, file, _use_new_zipfile_serialization=False)
