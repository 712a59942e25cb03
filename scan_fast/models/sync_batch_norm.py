"""Layers of batch normalisation that take their statistics from all ranks in training."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..ops.collectives import several_ranks
from ..ops.sync_batch_norm import sync_batch_norm
from .batch_norm import BatchNormAct2d

M = TypeVar("M", bound=nn.Module)


def synchronized(module: M) -> M:
    """Let every layer of batch normalisation take its statistics from all ranks in training; return the module.

    The layers are changed in place and keep their parameters, buffers, hooks, options and names. In evaluation, and
    without several ranks, they compute what they did before. A layer that was changed before stays as it is.

    In training every rank of the default process group must call the layers, in the same order.

    Args:
        module: a layer, or a network of any layers; not yet compiled.

    Raises:
        ValueError: for a class of batch normalisation other than PyTorch's, this package's and timm's BatchNormAct2d.
            Then nothing is changed.
    """
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    classes = [None if isinstance(layer, _OverRanks) else _counterpart(name, layer) for name, layer in found]
    for (_, layer), changed in zip(found, classes, strict=True):
        if changed is not None:
            # A change of class keeps all that refers to the layer: the optimiser, hooks, and its other names.
            layer.__class__ = changed
    return module


class _OverRanks(_BatchNorm):
    """The steps of every layer here. Among a layer's bases it comes before the plain layer."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, ...) to the same shape; N may differ between ranks in training."""
        if not _synchronises(self):
            return super().forward(x)
        self._check_input_dim(x)
        return _normalised(self, x)


class SyncBatchNorm1d(_OverRanks, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with the statistics of all ranks in training."""


class SyncBatchNorm2d(_OverRanks, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with the statistics of all ranks in training."""


class SyncBatchNorm3d(_OverRanks, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with the statistics of all ranks in training."""


class SyncNormThenAct2d(SyncBatchNorm2d):
    """The BatchNormAct2d of timm, with the statistics of all ranks in training: its ``drop`` and ``act`` follow."""

    drop: nn.Module
    act: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to the same shape."""
        y: Tensor = self.act(self.drop(super().forward(x)))
        return y


class SyncBatchNormAct2d(_OverRanks, BatchNormAct2d):
    """:class:`~scan_fast.models.batch_norm.BatchNormAct2d` with the statistics of all ranks in training."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Map (N, C, H, W), and a residual of that shape and dtype, to (N, C, H, W)."""
        if not _synchronises(self):
            return BatchNormAct2d.forward(self, x, residual)
        return _normalised(self, x, residual=residual, relu=self.relu)


_COUNTERPARTS: dict[type[_BatchNorm], type[_OverRanks]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    BatchNormAct2d: SyncBatchNormAct2d,
}
_TIMM_LAYER = ("timm.layers.norm_act", "BatchNormAct2d")
"""Known by its name, because timm is optional."""


def _counterpart(name: str, layer: _BatchNorm) -> type[_OverRanks]:
    kind = type(layer)
    # The class itself and not its subclasses, whose own steps would be lost.
    if kind in _COUNTERPARTS:
        return _COUNTERPARTS[kind]
    if (kind.__module__, kind.__qualname__) == _TIMM_LAYER:
        return SyncNormThenAct2d
    subject = f"layer {name!r}" if name else "the module"
    raise ValueError(
        f"{subject} is a {kind.__module__}.{kind.__qualname__}, which has no counterpart with the statistics of all "
        "ranks; torch's BatchNorm1d, 2d and 3d have one, and the BatchNormAct2d of scan_fast and timm"
    )


def _synchronises(layer: _BatchNorm) -> bool:
    return layer.training and several_ranks()


def _normalised(layer: _BatchNorm, x: Tensor, *, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    momentum = layer.momentum
    tracked = layer.track_running_stats
    if tracked and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
        if momentum is None:  # the average of all batches so far
            momentum = 1.0 / float(layer.num_batches_tracked)
    # A layer may lack either parameter, whatever its annotation says.
    given: dict[str, Tensor | None] = {"weight": layer.weight, "bias": layer.bias}
    weight, bias = given["weight"], given["bias"]
    return sync_batch_norm(
        x,
        torch.ones(layer.num_features, device=x.device) if weight is None else weight,
        torch.zeros(layer.num_features, device=x.device) if bias is None else bias,
        layer.running_mean if tracked else None,
        layer.running_var if tracked else None,
        residual=residual,
        momentum=0.0 if momentum is None else momentum,
        eps=layer.eps,
        relu=relu,
    )
