"""A whitened stem: uncorrelated outputs, pairs of filters, and what it is refused for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import opened
from torch import nn
from torch.nn import functional as F

from scan_fast.errors import ConfigError
from scan_fast.models.backbones import ModelConfig, SmallResNet, build_backbone
from scan_fast.models.heads import PretextModel
from scan_fast.models.whitening import whiten_stem
from scan_fast.stages.pretext import start_stem

KEY = (1, 2)


def smooth_images(count: int = 40, side: int = 16) -> torch.Tensor:
    """Images whose neighbouring pixels and channels are alike."""
    torch.manual_seed(0)
    coarse = torch.randn(count, 1, side // 4, side // 4)
    fine = F.interpolate(coarse, (side, side), mode="bilinear")
    return fine + 0.2 * torch.randn(count, 3, side, side)


def test_outputs_are_uncorrelated_and_of_one_variance() -> None:
    images = smooth_images()
    stem = nn.Conv2d(3, 54, 3, bias=False)
    whiten_stem(stem, images, KEY)
    outputs = stem(images).detach()[:, :27].transpose(0, 1).flatten(1).double()
    covariance = torch.cov(outputs)
    # The ridge takes a little of the directions of least variance.
    torch.testing.assert_close(covariance, torch.eye(27, dtype=torch.float64), atol=0.05, rtol=0)


def test_filters_come_in_pairs_and_further_channels_stay() -> None:
    images = smooth_images()
    few, many = nn.Conv2d(3, 9, 3, bias=False), nn.Conv2d(3, 60, 3, bias=False)
    last, rest = few.weight[8].detach().clone(), many.weight[54:].detach().clone()
    whiten_stem(few, images, KEY)
    whiten_stem(many, images, KEY)
    assert few.weight[:4].equal(-few.weight[4:8])
    assert few.weight[8].equal(last)
    assert many.weight[:27].equal(-many.weight[27:54])
    assert many.weight[54:].equal(rest)
    # Largest variance first: the same filters, as far as there are channels.
    assert few.weight[:4].equal(many.weight[:4])


def test_images_without_variance_give_finite_filters() -> None:
    stem = nn.Conv2d(3, 8, 3, bias=False)
    whiten_stem(stem, torch.ones(2, 3, 5, 5), KEY)
    assert stem.weight.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 2, 8), (3, 8, 8)])
def test_images_that_do_not_fit_the_stem_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="images must be"):
        whiten_stem(nn.Conv2d(3, 8, 3), torch.zeros(shape), KEY)


def test_a_run_starts_from_its_images(tmp_path: Path) -> None:
    with opened(tmp_path / "run", "model.stem=whitened") as context:
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(PretextModel(context.model_config))
        start_stem(context, models[1])
        random, whitened = (model.backbone.get_parameter("conv1.weight") for model in models)
        pairs = len(whitened) // 2
        assert whitened[:pairs].equal(-whitened[pairs : 2 * pairs])
        assert not whitened.equal(random)
        others = [dict(model.named_parameters()) for model in models]
        assert all(others[0][name].equal(others[1][name]) for name in others[0] if name != "backbone.conv1.weight")


def test_a_stem_is_whitened_only_if_asked(tmp_path: Path) -> None:
    with opened(tmp_path / "run") as context:
        model = PretextModel(context.model_config)
        before = model.backbone.get_parameter("conv1.weight").detach().clone()
        start_stem(context, model)
        assert before.equal(model.backbone.get_parameter("conv1.weight"))


@pytest.mark.parametrize("changes", [["model.backbone=resnet50", "model.width=1"], ["model.weights=w.safetensors"]])
def test_a_stem_of_given_weights_or_other_networks_is_refused(changes: list[str], tmp_path: Path) -> None:
    message = r"stem=whitened is for resnet18_cifar, .* from random weights only; backbone is"
    with pytest.raises(ConfigError, match=message), opened(tmp_path, "model.stem=whitened", *changes):
        pass


@pytest.mark.parametrize(("name", "blocks"), [("resnet18_pooled", 2), ("resnet10_pooled", 1)])
def test_pooled_networks_work_at_half_the_resolution(name: str, blocks: int) -> None:
    backbone = build_backbone(ModelConfig(backbone=name, width=0.125)).eval()
    assert isinstance(backbone, SmallResNet)
    assert [len(getattr(backbone, f"layer{number}")) for number in range(1, 5)] == [blocks] * 4
    x = torch.randn(2, 3, 32, 32)
    y = F.max_pool2d(F.relu(backbone.bn1(backbone.conv1(x))), 2)
    sides = []
    for number in range(1, 5):
        y = getattr(backbone, f"layer{number}")(y)
        sides.append(y.shape[-1])
    assert sides == [16, 8, 4, 2]
    torch.testing.assert_close(backbone(x), y.mean(dim=(2, 3)))
    assert backbone(torch.randn(2, 3, 27, 48)).shape == (2, 64)
