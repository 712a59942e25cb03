"""The learned stages as training code usually writes them: the baseline of :mod:`benchmarks.end_to_end`.

It is written from the paper (https://arxiv.org/abs/2005.12320) and its published settings, in the style of its time:
PIL and torchvision open and transform files in DataLoader workers (:mod:`benchmarks.baseline_images`), the network runs
in contiguous float32, losses are composed of PyTorch operations (:mod:`benchmarks.eager`), heads are a list, and every
step reads its loss with ``.item()``. Nothing in it is slowed down on purpose. It uses neither the data path of this
package nor its loop, losses or network. It takes the same configuration, so that both sides do the same work.

Parameters are named as in :mod:`scan_fast.models`, so that weights can be copied from one side to the other.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from scan_fast.methods import SimCLRSettings
from scan_fast.models.backbones import ModelConfig
from scan_fast.objectives import SCANSettings
from scan_fast.runs.config import ClusteringConfig, PretextConfig, SelfLabelConfig, TrainingConfig
from scan_fast.training.loop import learning_rate_factor

from . import eager, peers
from .baseline_images import Pairs, Single

Views = Sequence[Tensor]

# ---- networks ----------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, in_planes: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = nn.Conv2d(planes, planes, kernel_size=3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_planes, planes, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    """A ResNet for small images: a 3x3 stem, then layers of basic blocks."""

    def __init__(self, planes: Sequence[int], blocks: Sequence[int], max_pool: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, planes[0], kernel_size=3, stride=1, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes[0])
        self.maxpool = max_pool
        self.layers = len(planes)
        in_planes = planes[0]
        for i, (width, depth) in enumerate(zip(planes, blocks, strict=True)):
            strides = [1 if i == 0 else 2] + [1] * (depth - 1)
            layer = []
            for stride in strides:
                layer.append(Block(in_planes, width, stride))
                in_planes = width
            setattr(self, f"layer{i + 1}", nn.Sequential(*layer))
        self.features_dim = in_planes

    def forward(self, x: Tensor) -> Tensor:
        out = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        for i in range(self.layers):
            out = getattr(self, f"layer{i + 1}")(out)
        out = F.adaptive_avg_pool2d(out, 1)
        return torch.flatten(out, 1)


def resnet(config: ModelConfig) -> ResNet:
    """Build the network of a configuration.

    Raises:
        ValueError: for a backbone that the baseline does not have.
    """
    none, planes = nn.Identity(), (64, 128, 256, 512)
    shapes: dict[str, tuple[Sequence[int], Sequence[int], nn.Module]] = {
        "resnet18_cifar": (planes, (2, 2, 2, 2), none),
        "resnet18_stl": (planes, (2, 2, 2, 2), nn.MaxPool2d(kernel_size=2, stride=2, padding=1)),
        "resnet18_pooled": (planes, (2, 2, 2, 2), nn.MaxPool2d(kernel_size=2, stride=2)),
        "resnet10_pooled": (planes, (1, 1, 1, 1), nn.MaxPool2d(kernel_size=2, stride=2)),
        "resnet_digits": ((32, 64), (1, 2), none),
    }
    if config.backbone not in shapes:
        raise ValueError(f"the baseline has {', '.join(shapes)}; model.backbone is {config.backbone!r}")
    widths, blocks, max_pool = shapes[config.backbone]
    scaled = [max(8, round(p * config.width / 8) * 8) for p in widths]
    return ResNet(scaled, blocks, max_pool)


class ContrastiveModel(nn.Module):
    """Backbone and projector; the output is normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = resnet(config)
        dim = self.backbone.features_dim
        self.contrastive_head: nn.Module = nn.Linear(dim, config.projection_dim)
        if config.projector == "mlp":
            hidden = config.hidden_dim or dim
            self.contrastive_head = nn.Sequential(
                nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, config.projection_dim)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.contrastive_head(self.backbone(x)), dim=1)


class ClusteringModel(nn.Module):
    """Backbone and a list of linear heads, whose outputs are a list."""

    def __init__(self, config: ModelConfig, n_clusters: int, n_heads: int) -> None:
        super().__init__()
        self.backbone = resnet(config)
        self.cluster_head = nn.ModuleList([nn.Linear(self.backbone.features_dim, n_clusters) for _ in range(n_heads)])

    def heads(self, features: Tensor) -> list[Tensor]:
        return [head(features) for head in self.cluster_head]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.heads(self.backbone(x))


# ---- stages ------------------------------------------------------------------------------------------------------


class Stage(ABC):
    """One stage: network, optimiser and loader.

    Args:
        model: trained in place, in its device's contiguous float32.
        config: epochs, batch size, optimiser, schedule.
        dataset: the pairs of views.
        device: of the network.
        workers: processes that make the views.
    """

    def __init__(
        self, model: nn.Module, config: TrainingConfig, dataset: Pairs, device: torch.device, workers: int
    ) -> None:
        self.model = model.to(device)
        self.config = config
        self.device = device
        self.loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            dataset,
            batch_size=min(config.batch_size, len(dataset)),
            shuffle=True,
            num_workers=workers,
            pin_memory=device.type == "cuda",
            drop_last=True,
        )
        self.optimizer = _optimizer([p for p in model.parameters() if p.requires_grad], config)

    @abstractmethod
    def forward(self, views: Views) -> Any:
        """Pass the two views of a batch through the network."""

    @abstractmethod
    def loss(self, outputs: Any) -> Tensor:
        """Return the loss of what :meth:`forward` returned."""

    def train_mode(self) -> None:
        self.model.train()

    def after_step(self) -> None:  # noqa: B027
        """Run after every update; nothing in most stages."""

    def set_rate(self, epoch: int) -> None:
        factor = learning_rate_factor(self.config.schedule, epoch, self.config.epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.lr * factor

    def step(self, views: Views) -> float:
        """Train on a batch that is on the device and return its loss."""
        loss = self.loss(self.forward(views))
        value = loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.after_step()
        return value

    def epoch(self, number: int) -> float:
        """Train for one epoch (from 0) and return the mean loss."""
        self.set_rate(number)
        self.train_mode()
        total = 0.0
        for first, second in self.loader:
            views = [view.to(self.device, non_blocking=True) for view in (first, second)]
            total += self.step(views)
        return total / len(self.loader)


def _optimizer(parameters: list[nn.Parameter], config: TrainingConfig) -> torch.optim.Optimizer:
    settings = config.optimizer
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if not settings.decay_all:
        groups = [
            {"params": [p for p in parameters if p.ndim > 1]},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
    common: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=settings.nesterov, **common)
    return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[settings.name](groups, **common)


class SimCLR(Stage):
    """Stage one: both views through the network at once, the matrix of all similarities, a cross-entropy."""

    config: PretextConfig

    def forward(self, views: Views) -> Tensor:
        output: Tensor = self.model(torch.cat(list(views)))
        return output

    def loss(self, outputs: Tensor) -> Tensor:
        z0, z1 = outputs.chunk(2)
        method = self.config.method
        assert isinstance(method, SimCLRSettings)
        return eager.nt_xent(z0, z1, method.temperature, anchors=method.anchors)


class SCAN(Stage):
    """Stage two: anchors, neighbours, and a loss per head."""

    config: ClusteringConfig
    model: ClusteringModel

    def train_mode(self) -> None:
        self.model.train(self.config.update == "full")

    def forward(self, views: Views) -> list[list[Tensor]]:
        if self.config.update == "full":
            return [self.model(images) for images in views]
        with torch.no_grad():
            features = [self.model.backbone(images) for images in views]
        return [self.model.heads(f) for f in features]

    def loss(self, outputs: list[list[Tensor]]) -> Tensor:
        objective = self.config.objective
        assert isinstance(objective, SCANSettings)
        losses = [eager.scan_loss(a, n, objective.entropy_weight) for a, n in zip(*outputs, strict=True)]
        return torch.sum(torch.stack(losses))


class SelfLabel(Stage):
    """Stage three: labels from confident predictions on plain images, learned on strongly augmented ones."""

    config: SelfLabelConfig

    def __init__(
        self, model: nn.Module, config: SelfLabelConfig, dataset: Pairs, device: torch.device, workers: int
    ) -> None:
        super().__init__(model, config, dataset, device, workers)
        if config.ema is not None and config.ema_mode != "teacher":
            raise ValueError(f"the baseline has selflabel.ema_mode=teacher only, got {config.ema_mode!r}")
        self.teacher = self.model if config.ema is None else copy.deepcopy(self.model).eval()

    def forward(self, views: Views) -> list[Tensor]:
        weak, strong = views
        with torch.no_grad():
            target = self.teacher(weak)[0]
        return [target, self.model(strong)[0]]

    def loss(self, outputs: list[Tensor]) -> Tensor:
        weak, strong = outputs
        return eager.self_label_loss(weak, strong, self.config.threshold, balance=self.config.balance)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.config.ema is None:
            return
        for average, value in zip(self.teacher.state_dict().values(), self.model.state_dict().values(), strict=True):
            if average.is_floating_point():
                average.mul_(self.config.ema).add_(value, alpha=1 - self.config.ema)
            else:
                average.copy_(value)


# ---- mining ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def features(model: nn.Module, dataset: Single, batch_size: int, device: torch.device, workers: int) -> Tensor:
    """Return the network's output of every image, in order, on the CPU."""
    model.eval()
    loader: DataLoader[Tensor] = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    return torch.cat([model(images.to(device)).cpu() for images in loader])


def mine(embedding: Tensor, k: int) -> Tensor:
    """Return the k nearest neighbours (N, k) by faiss's flat index: ask for one more, drop the first."""
    faiss = peers.load_faiss()
    rows = embedding.numpy()
    index = faiss.IndexFlatIP(rows.shape[1])
    index.add(rows)
    _, found = index.search(rows, k + 1)
    return torch.from_numpy(found[:, 1:])
