"""Backbones: the networks that turn an image into a feature vector.

``resnet18_cifar``, ``resnet18_stl`` and ``resnet50`` have the parameter names of the original SCAN project, so that its
published weights load by name (see :mod:`.original_weights`).
"""

from __future__ import annotations

import difflib
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from typing_extensions import Self

from scan_fast.schema import Settings

from ..errors import ConfigError, WeightsError
from .batch_norm import BatchNormAct2d
from .convolution import Conv2d
from .descriptor import Descriptor
from .downloads import fetch, published_weights
from .published import PUBLISHED, full_name
from .timm_networks import takes_image_size, timm_backbone
from .weight_files import load_weight_file, read_checkpoint

DESCRIPTOR = "descriptor"
SMALL_RESNETS = ("resnet18_cifar", "resnet18_stl", "resnet18_pooled", "resnet10_pooled", "resnet_digits")
OWN_BACKBONES = (*SMALL_RESNETS, "resnet50", DESCRIPTOR)
AUTO = "auto"
_PREFIXES = ("torchvision:", "timm:")
_NAME = re.compile(r"\w[\w.-]*")


class ModelConfig(Settings):
    """The network of a run: the backbone and, for the pretext stage, the projector on top of it.

    Attributes:
        backbone: ``auto`` (the driver chooses by image size), ``resnet18_cifar`` (32 px: 3x3 stem, no max-pooling),
            ``resnet18_stl`` (96 px: the same with one max-pooling), ``resnet18_pooled`` and ``resnet10_pooled`` (for
            processors: half the resolution after the stem, so a quarter of the work; two blocks for each resolution or
            one), ``resnet50``, ``resnet_digits`` (a small one for 8x8 images), ``descriptor`` (edges and colours,
            nothing to train), ``torchvision:NAME`` or ``timm:NAME``; or a pretrained one by its short name:
            ``dinov2-small``, ``dinov2-base``, ``convnext-tiny``, ``resnet50-imagenet``, ``resnet18-imagenet``,
            ``efficientnet-lite0``, ``mobilenetv4-small`` (see docs/pretrained.md).
        width: multiplies the number of channels of ``resnet18_*``, ``resnet10_pooled`` and ``resnet_digits``.
        stem: first weights of the first convolution of these networks: ``random``, or ``whitened``, filters that make
            the patches of the training images white, for a pretext stage that trains from scratch.
        pretrained: start from the weights that torchvision or timm publish (``torchvision:``, ``timm:`` and short names
            only). A short name without ``weights`` implies it, unless it is set to false.
        weights: start from the weights in this file (.safetensors, or a state dict or checkpoint of torch.save). Every
            entry of the backbone must be in it; classifiers and projectors are left out.
        image_size: side in pixels of the images that a network with one position per patch is built for. Default: that
            of the images that the run evaluates.
        projector: ``mlp`` (linear, ReLU, linear), ``mlp_bn`` (with batch normalisation before the ReLU) or ``linear``.
        projection_dim: the size of the embedding that the pretext loss sees.
        hidden_dim: the hidden size of an ``mlp`` projector; None takes the backbone's feature size.
        unit_features: cluster heads see features of length one.
        cluster_head: ``linear``, or ``mlp`` (linear, ReLU, linear).
        cluster_hidden_dim: the hidden size of an ``mlp`` cluster head; None takes the backbone's feature size.
        sync_batch_norm: with several processes, batch normalisation takes the statistics of the whole batch, so that
            the result does not depend on their number. False: those of each process's images, which sends less.
    """

    backbone: str = "resnet18_cifar"
    width: float = Field(default=1.0, gt=0, le=16)
    stem: Literal["random", "whitened"] = "random"
    pretrained: bool = False
    weights: Path | None = None
    image_size: int | None = Field(default=None, ge=1)
    projector: Literal["mlp", "mlp_bn", "linear"] = "mlp"
    projection_dim: int = Field(default=128, ge=1)
    hidden_dim: int | None = Field(default=None, ge=1)
    unit_features: bool = False
    cluster_head: Literal["linear", "mlp"] = "linear"
    cluster_hidden_dim: int | None = Field(default=None, ge=1)
    sync_batch_norm: bool = True

    @field_validator("weights")
    @classmethod
    def _absolute(cls, weights: Path | None) -> Path | None:
        # A run continues from any folder.
        return None if weights is None else weights.expanduser().absolute()

    @model_validator(mode="before")
    @classmethod
    def _short_names_are_pretrained(cls, values: Any) -> Any:
        if isinstance(values, dict) and "pretrained" not in values and values.get("weights") is None:
            name = values.get("backbone")
            if isinstance(name, str) and name in PUBLISHED:
                return {**values, "pretrained": True}
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        name = self.backbone
        foreign = name.startswith(_PREFIXES) or name in PUBLISHED
        if not foreign and name not in (*OWN_BACKBONES, AUTO):
            near = difflib.get_close_matches(name, (*OWN_BACKBONES, *PUBLISHED), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"backbone must be auto, {', '.join((*OWN_BACKBONES, *PUBLISHED))}, torchvision:NAME or timm:NAME, "
                f"got {name!r}{hint}"
            )
        if name in _PREFIXES:
            raise ValueError(f"backbone {name!r} lacks the model's name, e.g. {name}resnet34")
        # timm takes hf-hub:... and local-dir:... for places to load a network from.
        if foreign and name not in PUBLISHED and not _NAME.fullmatch(name.partition(":")[2]):
            raise ValueError(f"backbone must be the name of a network of the library, got {name!r}")
        if self.pretrained and not foreign:
            raise ValueError(f"pretrained is for torchvision:NAME and timm:NAME only; backbone is {name!r}")
        if self.pretrained and self.weights is not None:
            raise ValueError(f"weights={self.weights} takes the place of pretrained=true; give one of them")
        if self.weights is not None and name == AUTO:
            raise ValueError(f"weights={self.weights} needs the backbone that they are of; backbone is 'auto'")
        if self.weights is not None and not self.learns:
            raise ValueError(f"weights={self.weights}: backbone {name!r} has no weights")
        if self.width != 1.0 and (foreign or name in ("resnet50", DESCRIPTOR)):
            raise ValueError(f"width is for resnet18_*, resnet10_pooled and resnet_digits only; backbone is {name!r}")
        if self.stem != "random" and (name not in (*SMALL_RESNETS, AUTO) or self.has_weights):
            given = f"backbone is {name!r}" + (" with given weights" if self.has_weights else "")
            raise ValueError(f"stem={self.stem} is for {', '.join(SMALL_RESNETS)} from random weights only; {given}")
        if self.hidden_dim is not None and self.projector == "linear":
            raise ValueError(
                f"hidden_dim is for projectors 'mlp' and 'mlp_bn' only, got {self.hidden_dim} with 'linear'"
            )
        if self.cluster_hidden_dim is not None and self.cluster_head == "linear":
            raise ValueError(
                f"cluster_hidden_dim is for cluster_head 'mlp' only, got {self.cluster_hidden_dim} with 'linear'"
            )
        return self

    @property
    def network(self) -> str:
        """The backbone with a short name spelled out, such as ``timm:vit_small_patch14_dinov2.lvd142m``."""
        return full_name(self.backbone)

    @property
    def learns(self) -> bool:
        """False if the backbone has no weights at all."""
        return self.backbone != DESCRIPTOR

    @property
    def has_weights(self) -> bool:
        """True if the network starts from published weights or those of a file."""
        return self.pretrained or self.weights is not None

    def from_scratch(self) -> Self:
        """Return the same network with random weights, for weights that come from elsewhere or none."""
        return self.model_copy(update={"pretrained": False, "weights": None})

    def for_images(self, side: int) -> Self:
        """Return the network built for images of ``side`` pixels, if it is built for one size and none is set."""
        library, _, name = self.network.partition(":")
        if self.image_size is not None or library != "timm" or not takes_image_size(name):
            return self
        return self.model_copy(update={"image_size": side})


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
        max_pool: halve the resolution after the stem. ``padded`` is for 96 px images, whose padding of 1 makes them end
            in 7x7. ``even`` has none, so that 32 px end in 2x2.
    """

    def __init__(
        self, channels: Sequence[int], blocks: Sequence[int], *, max_pool: Literal["none", "padded", "even"] = "none"
    ) -> None:
        super().__init__()
        self.out_features = channels[-1]
        self.conv1 = Conv2d(3, channels[0], 3, padding=1, bias=False)
        self.bn1 = BatchNormAct2d(channels[0])
        padding = int(max_pool == "padded")
        self.maxpool = nn.Identity() if max_pool == "none" else nn.MaxPool2d(2, stride=2, padding=padding)
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


_RESNETS: dict[str, tuple[tuple[int, ...], Literal["none", "padded", "even"]]] = {
    "resnet18_cifar": ((2, 2, 2, 2), "none"),
    "resnet18_stl": ((2, 2, 2, 2), "padded"),
    "resnet18_pooled": ((2, 2, 2, 2), "even"),
    "resnet10_pooled": ((1, 1, 1, 1), "even"),
}
"""Blocks for each resolution, and the max-pooling after the stem."""


def build_backbone(config: ModelConfig) -> nn.Module:
    """Build the backbone that ``config`` names, with the weights that it starts from.

    Returns:
        A module from images (B, 3, H, W) float to features (B, out_features), with the attribute ``out_features``.

    Raises:
        ConfigError: for an unknown torchvision or timm model, or one whose classifier cannot be taken off.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
        WeightsError: if the weights cannot be fetched, or those of a file do not fit.
    """
    network = config.network
    published = None
    if config.pretrained and (download := published_weights(network)) is not None:
        published = fetch(download, config.backbone)
    backbone = _build(config, network, published)
    if config.weights is not None:
        load_weight_file(backbone, config.weights, network)
    return backbone


def _build(config: ModelConfig, network: str, published: Path | None) -> nn.Module:
    if network in _RESNETS:
        blocks, max_pool = _RESNETS[network]
        channels = [scaled_channels(base, config.width) for base in (64, 128, 256, 512)]
        return SmallResNet(channels, blocks, max_pool=max_pool)
    if network == "resnet_digits":
        return SmallResNet([scaled_channels(base, config.width) for base in (32, 64)], (1, 2))
    if network == DESCRIPTOR:
        return Descriptor()
    if network == "resnet50":
        return _torchvision_backbone("resnet50", None)
    library, name = network.split(":", 1)
    if library == "torchvision":
        return _torchvision_backbone(name, published)
    if published is not None and published.suffix != ".npz":
        try:
            read_checkpoint(published)
        except WeightsError as error:
            raise WeightsError(
                f"{published} is not readable as the weights of {network} ({error}); remove it"
            ) from error
    return timm_backbone(name, config.image_size, published)


def check_image_size(config: ModelConfig, size: int) -> None:
    """Refuse images that the backbone cannot take. Nothing is computed and no weights are loaded.

    Args:
        config: the backbone.
        size: side of the images in pixels.

    Raises:
        ConfigError: if a torchvision or timm model needs images of another size, or larger ones.
    """
    if ":" not in config.network:
        return  # the other backbones take any size
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(config.from_scratch()).eval()
        try:
            with torch.no_grad():
                backbone(torch.empty(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"model.backbone={config.backbone} does not take images of {size} x {size} pixels ({error}); "
                "set data.image_size to a size that it takes, or choose another backbone"
            ) from error


def multiply_adds(config: ModelConfig, size: int) -> int:
    """Return the multiply-adds of the backbone for one image of ``size`` x ``size`` pixels. Nothing is computed."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.no_grad():
        backbone = build_backbone(config.from_scratch()).eval().requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            backbone(torch.empty(1, 3, size, size))
    return int(counter.get_total_flops()) // 2


def scaled_channels(channels: int, width: float) -> int:
    """Return a number of channels times ``model.width``, as a multiple of 8."""
    # Multiples of eight keep the matrix units of a GPU busy in 16-bit precision.
    return max(8, round(channels * width / 8) * 8)


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def _torchvision_backbone(name: str, published: Path | None) -> nn.Module:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"torchvision has no classification model {name!r}{hint}")
    try:
        if published is not None:
            # torchvision finds the file, which is in its cache now, and unpickles whatever lies there. A file that can
            # be read without running code is safe in that way too.
            read_checkpoint(published)
        module: Any = torchvision.models.get_model(name, weights="DEFAULT" if published is not None else None)
    except (WeightsError, RuntimeError, ValueError, OSError, EOFError, pickle.UnpicklingError) as error:
        if published is None:
            raise
        raise WeightsError(f"{published} is not readable as the weights of torchvision:{name}; remove it") from error
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
    module.classifier_names = (path,)
    module.out_features = layer.in_features
    return module
