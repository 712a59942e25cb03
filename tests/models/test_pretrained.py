"""The normalisation of pretrained weights, as the libraries that own them describe it; nothing is downloaded."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from scan_fast.errors import ConfigError
from scan_fast.methods import WeightsSettings
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import PretextModel
from scan_fast.models.pretrained import IMAGENET_MEAN, IMAGENET_STD, pretrained_input


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing may be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_torchvision_weights_bring_their_format() -> None:
    found = pretrained_input(ModelConfig(backbone="torchvision:resnet50", pretrained=True))
    assert found is not None
    assert (found.mean, found.std, found.size, found.interpolation) == (IMAGENET_MEAN, IMAGENET_STD, 224, "bilinear")
    swin = pretrained_input(ModelConfig(backbone="torchvision:swin_t", pretrained=True))
    assert swin is not None and swin.interpolation == "bicubic"


def test_timm_weights_bring_their_format() -> None:
    pytest.importorskip("timm")
    for name, mean, std, size in (
        ("resnet18.a1_in1k", IMAGENET_MEAN, IMAGENET_STD, 224),
        # Trained with another normalisation: ImageNet's would be silently wrong.
        ("vit_base_patch16_224.augreg_in21k", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 224),
        ("vit_base_patch16_clip_224.openai", (0.4814547, 0.4578275, 0.4082107), (0.2686295, 0.2613025, 0.2757711), 224),
    ):
        found = pretrained_input(ModelConfig(backbone=f"timm:{name}", pretrained=True))
        assert found is not None
        assert found.mean == pytest.approx(mean, abs=1e-5) and found.std == pytest.approx(std, abs=1e-5)
        assert found.size == size


def test_without_pretrained_weights_there_is_no_format() -> None:
    assert pretrained_input(ModelConfig(backbone="torchvision:resnet50")) is None
    assert pretrained_input(ModelConfig()) is None


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="torchvision has no pretrained weights for 'resnet19'"):
        pretrained_input(ModelConfig(backbone="torchvision:resnet19", pretrained=True))
    pytest.importorskip("timm")
    with pytest.raises(ConfigError, match="timm has no pretrained weights for 'resnet19'"):
        pretrained_input(ModelConfig(backbone="timm:resnet19", pretrained=True))


def test_moco_weights_expect_imagenets_normalisation(tmp_path: Path) -> None:
    model = PretextModel(ModelConfig(backbone="resnet18_cifar", width=0.125, projection_dim=16))
    state = model.state_dict()
    torch.save(state, tmp_path / "simclr.pth.tar")
    assert WeightsSettings(file=tmp_path / "simclr.pth.tar").input_format() is None
    moco = {
        "module.encoder_q." + name.removeprefix("backbone.").replace("contrastive_head.", "fc."): value
        for name, value in state.items()
    }
    torch.save({"state_dict": moco}, tmp_path / "moco.pth.tar")
    found = WeightsSettings(file=tmp_path / "moco.pth.tar").input_format()
    assert found is not None and (found.mean, found.std) == (IMAGENET_MEAN, IMAGENET_STD)
