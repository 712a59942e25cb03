"""Trains pretext methods on a few digits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from driving import opened

from scan_fast.methods import PretextMethod
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import PretextModel
from scan_fast.stages.handover import Handover
from scan_fast.stages.pretext import Pretext
from scan_fast.training.context import Context
from scan_fast.training.loop import train

M = TypeVar("M", bound=PretextMethod)


def trained(
    folder: Path, stages: Sequence[type[Pretext]], build: Callable[[Context, PretextModel], M], *settings: str
) -> tuple[PretextModel, M]:
    """Train a method in the given stages, one after the other, each with objects of its own."""
    words = ("runtime.checkpoint_seconds=0", "model.projection_dim=64", "pretext.epochs=2", *settings)
    with opened(folder, *words) as context:
        for stage in stages:
            torch.manual_seed(0)
            model = context.place(PretextModel(context.model_config))
            method = build(context, model)
            first = {id(p): p.detach().clone() for module in (model, *method.modules()) for p in module.parameters()}
            with contextlib.suppress(KeyboardInterrupt):
                train(stage(context, model, method, Handover()), context)
        weights = [p for module in (model, *method.modules()) for p in module.parameters() if p.ndim > 1]
        assert not any(p.equal(first[id(p)]) for p in weights)
        return model, method


def small_model() -> PretextModel:
    """Return a ResNet-18 of an eighth of the width."""
    return PretextModel(ModelConfig(backbone="resnet18_cifar", width=0.125, projection_dim=64))
