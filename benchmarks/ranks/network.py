"""Sizes of a network that time, traffic and memory follow from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import ClusterModel, PretextModel

FIRST_BUCKET = 1024**2
"""Bytes after which DistributedDataParallel closes its first bucket of gradients."""
BUCKET = 25 * 1024**2
"""Bytes after which it closes every other one."""


@dataclass(frozen=True)
class Network:
    """Sizes of a network.

    Attributes:
        parameters: number of elements of each trainable parameter, in order.
        frozen: number of elements of all other parameters.
        channels: number of channels of each batch-normalisation layer in training.
        multiply_adds: of one image's pass.
        activations: number of elements that the layers with weights and the normalisations put out for one image.
        features: D of the backbone's output.
    """

    parameters: tuple[int, ...]
    frozen: int
    channels: tuple[int, ...]
    multiply_adds: int
    activations: int
    features: int

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients, float32."""
        return 4 * sum(self.parameters)

    @property
    def buckets(self) -> int:
        """Number of all-reduces in which DistributedDataParallel sends the gradients of a step."""
        return buckets([4 * size for size in self.parameters])


def buckets(sizes: list[int]) -> int:
    """Return the number of buckets of gradients of these many bytes.

    After its first step DistributedDataParallel fills buckets in the order in which the gradients come, last layer
    first, and closes one when it has reached its limit.
    """
    count, filled, limit = 0, 0, FIRST_BUCKET
    for size in reversed(sizes):
        filled += size
        if filled >= limit:
            count, filled, limit = count + 1, 0, BUCKET
    return count + (filled > 0)


def pretext_network(config: ModelConfig, side: int) -> Network:
    """Return the sizes of backbone and projector for images of ``side`` pixels."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return _sizes(PretextModel(config.from_scratch()), side)


def cluster_network(config: ModelConfig, side: int, n_clusters: int, heads: int, *, frozen: bool) -> Network:
    """Return the sizes of backbone and cluster heads; a frozen backbone has no trainable parameter."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = ClusterModel(config.from_scratch(), n_clusters, heads)
        model.backbone.requires_grad_(not frozen)
        return _sizes(model, side)


def _sizes(model: PretextModel | ClusterModel, side: int) -> Network:
    elements = 0
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]

    def note(module: nn.Module, inputs: object, output: object) -> None:
        nonlocal elements
        if isinstance(output, torch.Tensor):
            elements += output.numel()

    hooks = [
        layer.register_forward_hook(note)
        for layer in model.modules()
        if isinstance(layer, (_BatchNorm, nn.Conv2d, nn.Linear, nn.LayerNorm))
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return Network(
        parameters=tuple(p.numel() for p in model.parameters() if p.requires_grad),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        channels=tuple(layer.num_features for layer in norms if layer.weight.requires_grad),
        multiply_adds=int(counter.get_total_flops()) // 2,
        activations=elements,
        features=model.out_features,
    )
