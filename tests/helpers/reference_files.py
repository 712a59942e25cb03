"""Weight files of the SCAN project, made from plain torch modules with its names, and small data sets for them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
STD = torch.tensor((0.2023, 0.1994, 0.2010)).view(1, 3, 1, 1)


class Block(nn.Module):
    """A basic block with the project's names: ``conv1, bn1, conv2, bn2, shortcut.0, shortcut.1``."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.shortcut = nn.Sequential()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class Net18(nn.Module):
    """The project's ResNet-18: of CIFAR, or with max-pooling that of STL-10."""

    def __init__(self, channels: int = 64, max_pool: bool = False) -> None:
        super().__init__()
        self.max_pool = max_pool
        self.conv1 = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        inside = channels
        for number in range(4):
            outside = channels * 2**number
            stride = 1 if number == 0 else 2
            self.add_module(
                f"layer{number + 1}", nn.Sequential(Block(inside, outside, stride), Block(outside, outside, 1))
            )
            inside = outside
        self.width = inside

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.max_pool:
            x = F.max_pool2d(x, 2, 2, 1)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return x.mean(dim=(2, 3))


class Pretext(nn.Module):
    """``backbone`` and ``contrastive_head``."""

    def __init__(self, backbone: nn.Module, width: int, linear: bool = False, dim: int = 128) -> None:
        super().__init__()
        self.backbone = backbone
        self.contrastive_head = (
            nn.Linear(width, dim)
            if linear
            else nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.contrastive_head(self.backbone(x))


class Clusters(nn.Module):
    """``backbone`` and ``cluster_head``, a list of linear heads."""

    def __init__(self, backbone: nn.Module, width: int, n_clusters: int, heads: int = 1) -> None:
        super().__init__()
        self.backbone = backbone
        self.cluster_head = nn.ModuleList(nn.Linear(width, n_clusters) for _ in range(heads))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        return [head(features) for head in self.cluster_head]


def settled(model: nn.Module, images: np.ndarray, mean: Tensor = MEAN, std: Tensor = STD) -> Any:
    """Give a network batch statistics of images, and heads that tell these apart; return it in evaluation mode."""
    x = normalised(images, mean, std)
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model.backbone(x)  # type: ignore[operator]
        model.eval()
        features = model.backbone(x)  # type: ignore[operator]
        for head in getattr(model, "cluster_head", []):
            head.weight.normal_()
            logits = features @ head.weight.T
            head.weight.div_(logits.std(dim=0)[:, None] / 2)
            head.bias.copy_(-(features @ head.weight.T).mean(dim=0))
    return model


def normalised(images: np.ndarray, mean: Tensor = MEAN, std: Tensor = STD) -> Tensor:
    """Return (N, H, W, 3) uint8 images as the project's networks see them."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


def prefixed(state: dict[str, Any], prefix: str = "module.") -> dict[str, Any]:
    """Return a state dict as DataParallel writes it."""
    return {prefix + name: value for name, value in state.items()}


def write(path: Path, content: Any, legacy: bool = False) -> Path:
    """Write a file of torch.save, in its format of today or the one before PyTorch 1.6."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


# -- images ------------------------------------------------------------------------------------------------------------


def pictures(count: int, side: int = 32, seed: int = 0, classes: int = 10) -> tuple[np.ndarray, list[int]]:
    """Return (N, side, side, 3) uint8 images of textures and the class of each."""
    generator = np.random.default_rng(seed)
    labels = [int(label) for label in generator.permutation(np.arange(count) % classes)]
    y, x = np.mgrid[:side, :side] * (32 / side)
    images = np.empty((count, side, side, 3), dtype=np.uint8)
    for number, label in enumerate(labels):
        angle, period = np.pi * label / classes, 3 + label % 4 * 2
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / period + generator.uniform(0, 6))
        colour = 128 + 60 * np.sin(label + np.arange(3) * 2)
        noise = generator.normal(0, 12, (side, side, 3))
        images[number] = np.clip(colour + 60 * wave[..., None] + noise, 0, 255).astype(np.uint8)
    return images, labels


def cifar10(root: Path, train: int, test: int, patch: Any) -> tuple[np.ndarray, np.ndarray]:
    """Write a small CIFAR-10 in torchvision's form; its checksums are replaced for the test.

    Returns:
        The training and the test images, (N, 32, 32, 3) uint8.
    """
    from torchvision import datasets

    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    parts: Sequence[tuple[str, int, int]] = (("data_batch_1", train, 1), ("test_batch", test, 2))
    found, sums = [], []
    for name, count, seed in parts:
        images, labels = pictures(count, seed=seed)
        rows = images.transpose(0, 3, 1, 2).reshape(count, -1)
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": labels}))
        found.append(images)
        sums.append([name, _md5(folder / name)])
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    meta = {"filename": "batches.meta", "key": "label_names", "md5": _md5(folder / "batches.meta")}
    patch.setattr(datasets.CIFAR10, "train_list", sums[:1])
    patch.setattr(datasets.CIFAR10, "test_list", sums[1:])
    patch.setattr(datasets.CIFAR10, "meta", meta)
    return found[0], found[1]


def labels_of(root: Path, name: str) -> list[int]:
    """Return the classes of the images in one batch of a small CIFAR-10."""
    content = pickle.loads((root / "cifar-10-batches-py" / name).read_bytes())
    return list(content["labels"])


def _md5(path: Path) -> str:
    import hashlib

    return hashlib.md5(path.read_bytes()).hexdigest()
