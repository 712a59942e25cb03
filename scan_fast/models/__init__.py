"""Networks: backbones, heads, and strict loading of weights."""

from .backbones import ModelConfig, build_backbone, check_image_size
from .heads import ClusterModel, PretextModel
from .reference_checkpoints import OriginalWeights, read_original
from .weights import load_strict

__all__ = [
    "ClusterModel",
    "ModelConfig",
    "OriginalWeights",
    "PretextModel",
    "build_backbone",
    "check_image_size",
    "load_strict",
    "read_original",
]
