"""Backbones, heads and strict loading."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from scan_fast.errors import ConfigError, WeightsError
from scan_fast.models import (
    ClusterModel,
    ModelConfig,
    PretextModel,
    build_backbone,
    check_image_size,
    load_strict,
)

DIGITS = ModelConfig(backbone="resnet_digits", projection_dim=16)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def resnet18_names() -> set[str]:
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = {"conv1.weight", *(f"bn1.{leaf}" for leaf in norm)}
    for layer in range(1, 5):
        for block in range(2):
            at = f"layer{layer}.{block}"
            names |= {f"{at}.conv1.weight", f"{at}.conv2.weight"}
            names |= {f"{at}.bn{i}.{leaf}" for i in (1, 2) for leaf in norm}
        if layer > 1:
            names |= {f"layer{layer}.0.shortcut.0.weight", *(f"layer{layer}.0.shortcut.1.{leaf}" for leaf in norm)}
    return names


@pytest.mark.parametrize("name", ["resnet18_cifar", "resnet18_stl"])
def test_resnet18_has_the_original_names_and_size(name: str) -> None:
    backbone = build_backbone(ModelConfig(backbone=name))
    assert set(backbone.state_dict()) == resnet18_names()
    assert parameters(backbone) == 11_168_832
    assert backbone.out_features == 512
    assert tuple(backbone.state_dict()["conv1.weight"].shape) == (64, 3, 3, 3)


def test_sizes_of_whole_models() -> None:
    pretext = PretextModel(ModelConfig())
    assert parameters(pretext) == 11_497_152
    assert len(pretext.state_dict()) == 124
    assert tuple(pretext.state_dict()["contrastive_head.2.weight"].shape) == (128, 512)
    cluster = ClusterModel(ModelConfig(), 10)
    assert parameters(cluster) == 11_173_962
    assert len(cluster.state_dict()) == 122
    assert 100_000 <= parameters(build_backbone(DIGITS)) <= 300_000


def test_resnet18_equals_torchvisions_blocks() -> None:
    """Torchvision's ResNet-18 with the stem replaced computes the same from the same weights."""
    torch.manual_seed(0)
    ours = build_backbone(ModelConfig(backbone="resnet18_cifar")).eval()
    theirs = torchvision.models.resnet18()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    for buffer in ours.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    theirs.load_state_dict({name.replace("shortcut", "downsample"): v for name, v in ours.state_dict().items()})
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs.eval()(x))


def test_stl_stem_matches_a_fixed_seven_pixel_pool_and_takes_other_sizes() -> None:
    backbone: Any = build_backbone(ModelConfig(backbone="resnet18_stl", width=0.125)).eval()
    x = torch.randn(2, 3, 96, 96)
    y = F.max_pool2d(F.relu(backbone.bn1(backbone.conv1(x))), 2, stride=2, padding=1)
    for layer in (backbone.layer1, backbone.layer2, backbone.layer3, backbone.layer4):
        y = layer(y)
    assert y.shape[2:] == (7, 7)
    torch.testing.assert_close(backbone(x), F.avg_pool2d(y, 7, stride=1).flatten(1))
    assert backbone(torch.randn(2, 3, 64, 48)).shape == (2, 64)


def test_resnet50_has_torchvisions_names_without_the_classifier() -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone="resnet50"))
        wanted = {name for name in torchvision.models.resnet50().state_dict() if not name.startswith("fc.")}
    assert set(backbone.state_dict()) == wanted
    assert len(wanted) == 318
    assert parameters(backbone) == 23_508_032
    assert backbone.out_features == 2048


def test_initialisation_is_kaiming_fan_out() -> None:
    torch.manual_seed(0)
    backbone: Any = build_backbone(ModelConfig())
    weight = backbone.layer3[1].conv1.weight
    assert weight.std().item() == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("name", ["resnet18", "vit_b_16", "mobilenet_v3_small", "convnext_tiny", "densenet121"])
def test_torchvision_models_lose_their_classifier(name: str) -> None:
    with torch.device("meta"):
        backbone = build_backbone(ModelConfig(backbone=f"torchvision:{name}")).eval()
        features = backbone(torch.zeros(2, 3, 224, 224))
    assert features.shape == (2, backbone.out_features)
    assert not any(isinstance(m, nn.Linear) and m.out_features == 1000 for m in backbone.modules())


def test_width_scales_channels() -> None:
    assert build_backbone(ModelConfig(width=0.5)).out_features == 256
    assert build_backbone(ModelConfig(backbone="resnet_digits", width=1.5)).out_features == 96
    assert build_backbone(ModelConfig(width=0.001)).out_features == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "resnet18_cifr"}, "did you mean 'resnet18_cifar'"),
        ({"backbone": "torchvision:"}, "lacks the model's name"),
        ({"pretrained": True}, "pretrained is for torchvision"),
        ({"backbone": "resnet50", "width": 2.0}, "width is for"),
        ({"projector": "linear", "hidden_dim": 8}, "hidden_dim is for"),
        ({"width": 0.0}, "greater than 0"),
        ({"projection_dim": 0}, "greater than or equal to 1"),
        ({"stem": "cifar"}, "'random' or 'whitened'"),
        ({"stems": "random"}, "Extra inputs"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize(
    ("name", "message"),
    [("resnet19", "did you mean resnet1"), ("googlenet", "2|3 linear"), ("squeezenet1_0", "0 linear classifiers")],
)
def test_unusable_torchvision_models_are_refused(name: str, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_backbone(ModelConfig(backbone=f"torchvision:{name}"))


@pytest.mark.parametrize(
    ("name", "size", "fits", "reason"),
    [("vit_b_16", 32, 224, "Expected 224 but got 32"), ("alexnet", 32, 63, "Output size is too small")],
)
def test_images_of_a_size_that_the_backbone_does_not_take(name: str, size: int, fits: int, reason: str) -> None:
    config = ModelConfig(backbone=f"torchvision:{name}")
    state = torch.get_rng_state()
    check_image_size(config, fits)
    with pytest.raises(ConfigError, match=rf"torchvision:{name} .* {size} x {size} pixels .*{reason}.*data.image_size"):
        check_image_size(config, size)
    assert torch.equal(torch.get_rng_state(), state)


def test_own_backbones_take_any_size() -> None:
    check_image_size(ModelConfig(backbone="resnet18_cifar"), 1)


def test_timm_is_optional() -> None:
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"scan-fast\[timm\]"):
            build_backbone(ModelConfig(backbone="timm:resnet18"))
        return
    backbone = build_backbone(ModelConfig(backbone="timm:mobilenetv3_small_050")).eval()
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, backbone.out_features)
    with pytest.raises(ValueError, match="did you mean"):
        build_backbone(ModelConfig(backbone="timm:resnet181"))


def test_projectors() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    mlp = PretextModel(DIGITS).eval()
    state = mlp.state_dict()
    hidden = F.relu(mlp.features(x) @ state["contrastive_head.0.weight"].T + state["contrastive_head.0.bias"])
    expected = hidden @ state["contrastive_head.2.weight"].T + state["contrastive_head.2.bias"]
    torch.testing.assert_close(mlp(x), expected)
    linear = PretextModel(DIGITS.model_copy(update={"projector": "linear"})).eval()
    assert tuple(linear.state_dict()["contrastive_head.weight"].shape) == (16, 64)
    assert linear(x).shape == (4, 16)
    wide = PretextModel(DIGITS.model_copy(update={"hidden_dim": 24}))
    assert tuple(wide.state_dict()["contrastive_head.0.weight"].shape) == (24, 64)


def test_heads_equal_each_linear_and_share_with_the_single_head_view() -> None:
    torch.manual_seed(0)
    model = ClusterModel(DIGITS, n_clusters=7, n_heads=3).eval()
    x = torch.randn(5, 3, 8, 8)
    logits = model(x)
    assert logits.shape == (3, 5, 7)
    features = model.features(x)
    for h in range(3):
        weight, bias = model.state_dict()[f"cluster_head.{h}.weight"], model.state_dict()[f"cluster_head.{h}.bias"]
        torch.testing.assert_close(logits[h], features @ weight.T + bias)
    view = model.head(2)
    assert not view.training
    assert (view.n_heads, view.n_clusters, view.out_features) == (1, 7, 64)
    torch.testing.assert_close(view(x)[0], logits[2])
    assert {name for name in view.state_dict() if name.startswith("cluster_head")} == {
        "cluster_head.0.weight",
        "cluster_head.0.bias",
    }
    head = view.cluster_head[0]
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        head.bias.add_(1)
    torch.testing.assert_close(model(x)[2], logits[2] + 1)
    torch.testing.assert_close(model(x)[:2], logits[:2])
    view.train()
    assert model.backbone.training and model.n_heads == 3


def test_every_head_receives_its_own_gradient() -> None:
    model = ClusterModel(DIGITS, n_clusters=4, n_heads=2).eval()
    model.heads(torch.ones(3, 64))[1].sum().backward()
    gradients: list[Any] = [head.weight.grad for head in model.cluster_head]
    assert torch.equal(gradients[0], torch.zeros(4, 64))
    assert torch.equal(gradients[1], torch.full((4, 64), 3.0))


@pytest.mark.parametrize(("n_clusters", "n_heads"), [(1, 1), (10, 0)])
def test_too_few_clusters_or_heads(n_clusters: int, n_heads: int) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        ClusterModel(DIGITS, n_clusters, n_heads)
    with pytest.raises(ValueError, match="from 0 to 0, got 1"):
        ClusterModel(DIGITS, 2).head(1)


def test_load_strict_copies_everything() -> None:
    source, target = PretextModel(DIGITS), PretextModel(DIGITS)
    load_strict(target, source.state_dict(), what="the weights")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_load_strict_names_every_difference_and_changes_nothing() -> None:
    target = ClusterModel(DIGITS, 3)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()}
    state["backbone.extra"] = torch.zeros(1)
    del state["backbone.bn1.weight"]
    state["cluster_head.0.weight"] = torch.zeros(4, 64)
    state["backbone.bn1.bias"] = torch.full_like(state["backbone.bn1.bias"], float("nan"))
    with pytest.raises(WeightsError) as info:
        load_strict(target, state, what="the weights a.pt")
    message = str(info.value)
    assert "the weights a.pt do not fit ClusterModel" in message
    assert "1 missing (backbone.bn1.weight)" in message
    assert "1 unexpected (backbone.extra)" in message
    assert "cluster_head.0.weight: (4, 64) where the model has (3, 64)" in message
    assert "1 not finite (backbone.bn1.bias)" in message
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_load_strict_refuses_to_load_nothing() -> None:
    with pytest.raises(WeightsError, match=r"120 missing .* and 108 more"):
        load_strict(build_backbone(ModelConfig(width=0.125)), {}, what="w")
