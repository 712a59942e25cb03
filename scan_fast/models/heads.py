"""The two networks of a run: backbone with projector (pretext), and backbone with cluster heads."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbones import ModelConfig, build_backbone


class PretextModel(nn.Module):
    """A backbone and the projector whose output the pretext loss and the neighbour search see.

    The parameters are named ``backbone.*`` and ``contrastive_head.*`` (``0`` and ``2`` for the MLP's two layers), as in
    the original project.

    Attributes:
        config: the settings that it was built from.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = build_backbone(config)
        self.out_features = cast(int, self.backbone.out_features)
        self.contrastive_head: nn.Module
        if config.projector == "linear":
            self.contrastive_head = nn.Linear(self.out_features, config.projection_dim)
        else:
            hidden = config.hidden_dim or self.out_features
            normalised = config.projector == "mlp_bn"
            self.contrastive_head = nn.Sequential(
                nn.Linear(self.out_features, hidden, bias=not normalised),
                *([nn.BatchNorm1d(hidden)] if normalised else []),
                nn.ReLU(),
                nn.Linear(hidden, config.projection_dim),
            )

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the backbone's features (B, out_features)."""
        return self.backbone(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to embeddings (B, projection_dim), not normalised."""
        return self.contrastive_head(self.backbone(x))


class ClusterModel(nn.Module):
    """A backbone and H cluster heads, named ``backbone.*`` and ``cluster_head.{h}.*``.

    Linear heads are named ``cluster_head.{h}.weight|bias``, as in the reference project.

    Args:
        config: the backbone and the form of the heads; the projector's settings are not used.
        n_clusters: C, the clusters of each head, at least 2.
        n_heads: H, at least 1.

    Raises:
        ValueError: for too few clusters or heads.
    """

    def __init__(self, config: ModelConfig, n_clusters: int, n_heads: int = 1) -> None:
        super().__init__()
        if n_clusters < 2:
            raise ValueError(f"n_clusters must be at least 2, got {n_clusters}")
        if n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, got {n_heads}")
        self.backbone = build_backbone(config)
        self.out_features = cast(int, self.backbone.out_features)
        self._n_clusters = n_clusters
        self._unit_features = config.unit_features
        hidden = (config.cluster_hidden_dim or self.out_features) if config.cluster_head == "mlp" else None
        self.cluster_head = nn.ModuleList(_head(self.out_features, hidden, n_clusters) for _ in range(n_heads))

    @property
    def n_heads(self) -> int:
        """H, the number of heads."""
        return len(self.cluster_head)

    @property
    def n_clusters(self) -> int:
        """C, the number of clusters of each head."""
        return self._n_clusters

    def features(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the backbone's features (B, out_features)."""
        return self.backbone(x)

    def heads(self, features: Tensor) -> Tensor:
        """Map features (B, out_features) to the logits of all heads, (H, B, C); linear heads in one matrix product."""
        if self._unit_features:
            features = F.normalize(features, dim=1)
        linears = [head for head in self.cluster_head if isinstance(head, nn.Linear)]
        if len(linears) < self.n_heads:
            return torch.stack([head(features) for head in self.cluster_head])
        if len(linears) == 1:
            return cast(Tensor, linears[0](features)[None])
        weight = torch.cat([linear.weight for linear in linears])
        bias = torch.cat([linear.bias for linear in linears])
        return F.linear(features, weight, bias).unflatten(1, (self.n_heads, self.n_clusters)).movedim(1, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, 3, H, W) to the logits of all heads, (H, B, C)."""
        return self.heads(self.backbone(x))

    def head(self, h: int) -> ClusterModel:
        """Return a model with head ``h`` alone, as its head 0; parameters and backbone are shared with this model.

        Raises:
            ValueError: if there is no such head.
        """
        if not 0 <= h < self.n_heads:
            raise ValueError(f"h must be from 0 to {self.n_heads - 1}, got {h}")
        view = self.around(self.backbone)
        view.cluster_head = nn.ModuleList([self.cluster_head[h]])
        return view

    def around(self, backbone: nn.Module) -> ClusterModel:
        """Return a model with these heads, whose parameters are shared, on another backbone.

        ``around(nn.Identity())`` maps features to logits.
        """
        view = ClusterModel.__new__(ClusterModel)
        nn.Module.__init__(view)
        view.backbone = backbone
        view.out_features = self.out_features
        view._n_clusters = self._n_clusters
        view._unit_features = self._unit_features
        view.cluster_head = self.cluster_head
        view.training = self.training
        return view

    @classmethod
    def linear(cls, in_features: int, n_clusters: int, n_heads: int) -> ClusterModel:
        """Return H linear heads without a backbone: the model maps features (B, in_features) to logits (H, B, C)."""
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.backbone = nn.Identity()
        model.out_features = in_features
        model._n_clusters = n_clusters
        model._unit_features = False
        model.cluster_head = nn.ModuleList(_head(in_features, None, n_clusters) for _ in range(n_heads))
        return model


def _head(features: int, hidden: int | None, n_clusters: int) -> nn.Module:
    if hidden is None:
        return nn.Linear(features, n_clusters)
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, n_clusters))
