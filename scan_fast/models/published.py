"""Short names of pretrained networks, with what they cost and the licence of their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Published:
    """A network with published weights, for images of one size.

    Attributes:
        backbone: the network and its weights, as ``model.backbone`` names them in full.
        side: side of its images in pixels.
        features: size of its feature vector.
        multiply_adds: of one image, in units of 1e9.
        parameters: without the classifier, in units of 1e6.
        download: size of the weight file in MB (1e6 bytes).
        licence: licence of the weights as their publisher states it (SPDX identifier).
        training: how the weights were trained.
    """

    backbone: str
    side: int
    features: int
    multiply_adds: float
    parameters: float
    download: int
    licence: str
    training: str


PUBLISHED: dict[str, Published] = {
    "dinov2-small": Published(
        "timm:vit_small_patch14_dinov2.lvd142m", 224, 384, 6.12, 21.6, 88, "Apache-2.0", "DINOv2 on 142 M images"
    ),
    "dinov2-base": Published(
        "timm:vit_base_patch14_dinov2.lvd142m", 224, 768, 23.16, 85.7, 346, "Apache-2.0", "DINOv2 on 142 M images"
    ),
    "convnext-tiny": Published(
        "timm:convnext_tiny.in12k", 224, 768, 4.45, 27.8, 148, "Apache-2.0", "labels of ImageNet-12k"
    ),
    "resnet50-imagenet": Published(
        "timm:resnet50.tv_in1k", 224, 2048, 4.09, 23.5, 102, "BSD-3-Clause", "labels of ImageNet-1k"
    ),
    "resnet18-imagenet": Published(
        "timm:resnet18.tv_in1k", 224, 512, 1.81, 11.2, 47, "BSD-3-Clause", "labels of ImageNet-1k"
    ),
    "efficientnet-lite0": Published(
        "timm:tf_efficientnet_lite0.in1k", 224, 1280, 0.38, 3.4, 19, "Apache-2.0", "labels of ImageNet-1k"
    ),
    "mobilenetv4-small": Published(
        "timm:mobilenetv4_conv_small.e2400_r224_in1k", 224, 1280, 0.18, 2.5, 15, "Apache-2.0", "labels of ImageNet-1k"
    ),
}
"""By short name, the strongest first; the last ones are for slow machines."""


def full_name(backbone: str) -> str:
    """Return the network that a short name stands for; any other name as it is."""
    published = PUBLISHED.get(backbone)
    return backbone if published is None else published.backbone


def table() -> list[str]:
    """Return the table as lines of text for the terminal."""
    width = max(map(len, PUBLISHED))
    return [
        f"{name:<{width}}  {entry.side} px, {entry.features} features, {entry.multiply_adds:.2f} G multiply-adds, "
        f"{entry.download} MB, {entry.licence}, {entry.training}"
        for name, entry in PUBLISHED.items()
    ]
