"""Backbones: the networks that turn an image into a feature vector.

``resnet18_cifar``, ``resnet18_stl`` and ``resnet50`` have the parameter names of the original SCAN project, so that its
published weights load by name (see :mod:`.original_weights`).
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torchvision
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from scan_fast.schema import Settings

from ..errors import ConfigError, MissingPackageError
from .batch_norm import BatchNormAct2d
from .convolution import Conv2d

OWN_BACKBONES = ("resnet18_cifar", "resnet18_stl", "resnet50", "resnet_digits")
AUTO = "auto"
_PREFIXES = ("torchvision:", "timm:")


class ModelConfig(Settings):
    """The network of a run: the backbone and, for the pretext stage, the projector on top of it.

    Attributes:
        backbone: ``auto`` (the driver chooses by image size), ``resnet18_cifar`` (32 px: 3x3 stem, no max-pooling),
            ``resnet18_stl`` (96 px: the same with one max-pooling), ``resnet50``, ``resnet_digits`` (a small one for
            8x8 images), ``torchvision:NAME`` or ``timm:NAME``.
        width: multiplies the number of channels of ``resnet18_*`` and ``resnet_digits``.
        pretrained: start from the weights that torchvision or timm publish (``torchvision:`` and ``timm:`` only).
        projector: ``mlp`` (linear, ReLU, linear) or ``linear``.
        projection_dim: the size of the embedding that the pretext loss sees.
        hidden_dim: the hidden size of the ``mlp`` projector; None takes the backbone's feature size.
        unit_features: cluster heads see features of length one.
        cluster_head: ``linear``, or ``mlp`` (linear, ReLU, linear).
        cluster_hidden_dim: the hidden size of an ``mlp`` cluster head; None takes the backbone's feature size.
    """

    backbone: str = "resnet18_cifar"
    width: float = Field(default=1.0, gt=0, le=16)
    pretrained: bool = False
    projector: Literal["mlp", "linear"] = "mlp"
    projection_dim: int = Field(default=128, ge=1)
    hidden_dim: int | None = Field(default=None, ge=1)
    unit_features: bool = False
    cluster_head: Literal["linear", "mlp"] = "linear"
    cluster_hidden_dim: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        name = self.backbone
        foreign = name.startswith(_PREFIXES)
        if not foreign and name not in (*OWN_BACKBONES, AUTO):
            near = difflib.get_close_matches(name, OWN_BACKBONES, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"backbone must be auto, {', '.join(OWN_BACKBONES)}, torchvision:NAME or timm:NAME, got {name!r}{hint}"
            )
        if foreign and not name.split(":", 1)[1]:
            raise ValueError(f"backbone {name!r} lacks the model's name, e.g. {name}resnet34")
        if self.pretrained and not foreign:
            raise ValueError(f"pretrained is for torchvision:NAME and timm:NAME only; backbone is {name!r}")
        if self.width != 1.0 and (foreign or name == "resnet50"):
            raise ValueError(f"width is for resnet18_* and resnet_digits only; backbone is {name!r}")
        if self.hidden_dim is not None and self.projector == "linear":
            raise ValueError(f"hidden_dim is for projector 'mlp' only, got {self.hidden_dim} with 'linear'")
        if self.cluster_hidden_dim is not None and self.cluster_head == "linear":
            raise ValueError(
                f"cluster_hidden_dim is for cluster_head 'mlp' only, got {self.cluster_hidden_dim} with 'linear'"
            )
        return self


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (ResNet, arXiv 1512.03385, figure 2)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(channels)
        self.conv2 = Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = BatchNormAct2d(channels)
        # Empty if the shapes agree: such a shortcut has no entry in the state dict.
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            self.shortcut.append(Conv2d(in_channels, channels, 1, stride=stride, bias=False))
            self.shortcut.append(BatchNormAct2d(channels, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, channels, H / stride, W / stride), rounded up."""
        y, around = self.conv1.fork(x)
        out: Tensor = self.bn2(self.conv2(self.bn1(y)), residual=self.shortcut(around))
        return out


class SmallResNet(nn.Module):
    """A ResNet of basic blocks with a 3x3 stem, for small images of any size.

    Args:
        channels: the channels of each stage; every stage but the first halves the resolution.
        blocks: the blocks of each stage.
        max_pool: halve the resolution after the stem, as for 96 px images. The padding of 1 makes 96 px end in 7x7.
    """

    def __init__(self, channels: Sequence[int], blocks: Sequence[int], *, max_pool: bool = False) -> None:
        super().__init__()
        self.out_features = channels[-1]
        self.conv1 = Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(channels[0])
        self.maxpool = nn.MaxPool2d(2, stride=2, padding=1) if max_pool else nn.Identity()
        self._stages: list[str] = []
        in_channels = channels[0]
        for number, (width, depth) in enumerate(zip(channels, blocks, strict=True), start=1):
            stage = nn.Sequential()
            for block in range(depth):
                stage.append(BasicBlock(in_channels, width, stride=2 if number > 1 and block == 0 else 1))
                in_channels = width
            self._stages.append(f"layer{number}")
            self.add_module(self._stages[-1], stage)
        _initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to features (B, out_features)."""
        x = self.maxpool(self.bn1(self.conv1(x)))
        for name in self._stages:
            x = getattr(self, name)(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


def build_backbone(config: ModelConfig) -> nn.Module:
    """Build the backbone that ``config`` names.

    Returns:
        A module from images (B, 3, H, W) float to features (B, out_features), with the attribute ``out_features``.

    Raises:
        ConfigError: for an unknown torchvision or timm model, or one whose classifier cannot be taken off.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
    """
    name = config.backbone
    if name in ("resnet18_cifar", "resnet18_stl"):
        channels = [_scaled(base, config.width) for base in (64, 128, 256, 512)]
        return SmallResNet(channels, (2, 2, 2, 2), max_pool=name == "resnet18_stl")
    if name == "resnet_digits":
        return SmallResNet([_scaled(base, config.width) for base in (32, 64)], (1, 2))
    if name == "resnet50":
        return _torchvision_backbone("resnet50", pretrained=False)
    library, model = name.split(":", 1)
    build = _torchvision_backbone if library == "torchvision" else _timm_backbone
    return build(model, pretrained=config.pretrained)


def check_image_size(config: ModelConfig, size: int) -> None:
    """Refuse images that the backbone cannot take. Nothing is computed and no weights are loaded.

    Args:
        config: the backbone.
        size: side of the images in pixels.

    Raises:
        ConfigError: if a torchvision or timm model needs images of another size, or larger ones.
    """
    if ":" not in config.backbone:
        return  # the other backbones take any size
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(config.model_copy(update={"pretrained": False})).eval()
        try:
            with torch.no_grad():
                backbone(torch.empty(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model.backbone={config.backbone} does not take images of {size} x {size} pixels ({error}); "
                "set data.image_size to a size that it takes, or choose another backbone"
            ) from error


def _scaled(channels: int, width: float) -> int:
    # Multiples of eight keep the matrix units of a GPU busy in 16-bit precision.
    return max(8, round(channels * width / 8) * 8)


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _torchvision_backbone(name: str, *, pretrained: bool) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"torchvision has no classification model {name!r}{hint}")
    module: Any = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    # Every torchvision classifier ends in a linear layer with one output per ImageNet class. Two of them mean auxiliary
    # outputs (GoogLeNet, Inception), whose training output is not one tensor; none, a convolutional classifier.
    classifiers = [
        (path, layer)
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == 1000
    ]
    if len(classifiers) != 1:
        raise ConfigError(
            f"torchvision:{name} cannot be a backbone: it has {len(classifiers)} linear classifiers where one is needed"
        )
    path, layer = classifiers[0]
    module.set_submodule(path, nn.Identity())
    module.out_features = layer.in_features
    return module


def timm_library(name: str) -> Any:
    """Return the package timm.

    Args:
        name: the model it is needed for, for the error.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError(f"backbone 'timm:{name}' needs timm: pip install 'scan-fast[timm]'") from error
    return timm


def _timm_backbone(name: str, *, pretrained: bool) -> nn.Module:
    timm = timm_library(name)
    known = timm.list_models()
    if name.split(".", 1)[0] not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"timm has no model {name!r}{hint}")
    module: Any = timm.create_model(name, pretrained=pretrained, num_classes=0)
    # Some models (MobileNetV3) keep a hidden layer after the pooling when the classifier is taken off.
    module.out_features = int(getattr(module, "head_hidden_size", None) or module.num_features)
    return module
