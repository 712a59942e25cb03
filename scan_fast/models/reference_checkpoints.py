"""Reads the weight files of the original SCAN project and of MoCo v2.

The files are never unpickled freely: ``torch.load(weights_only=True)`` builds tensors and plain containers only, with
an allow-list for the NumPy scalars in which the original project stores the index of its best head.

==========  ==================================================================  ====================
kind        file                                                                names
==========  ==================================================================  ====================
pretext     a state dict, or ``{"model", "optimizer", "epoch"}``                backbone.*, contrastive_head.*
scan        ``{"model", "head"}``, or a checkpoint with ``best_loss_head``;     backbone.*, cluster_head.{h}.*
            or several heads of which the file names none as the best
selflabel   a state dict with one head, or a checkpoint without a best head     backbone.*, cluster_head.0.*
moco        ``{"state_dict"}``                                                  module.encoder_q.*
==========  ==================================================================  ====================
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor, nn

from ..errors import WeightsError
from .backbones import ModelConfig, scaled_channels
from .weight_files import read_checkpoint
from .weights import load_strict, unusable_entries

Kind = Literal["pretext", "moco", "scan", "selflabel"]

_LEAF = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
_BACKBONE = re.compile(
    rf"backbone\.(conv1|bn1|layer[1-4]\.\d+\.(conv[1-3]|bn[1-3]|shortcut\.[01]|downsample\.[01]))\.{_LEAF}"
)
_PROJECTOR = re.compile(r"contrastive_head\.((0|2)\.)?(weight|bias)")
_CLUSTER = re.compile(r"cluster_head\.(\d+)\.(weight|bias)")
# What MoCo's training code saves beside the query encoder; the published file was cleaned of it.
_MOCO_OTHER = re.compile(r"module\.(encoder_k\..*|queue|queue_ptr)")


@dataclass(frozen=True)
class OriginalWeights:
    """The weights of one file, under scan-fast's (and the original project's) names.

    Attributes:
        kind: what the file holds.
        state_dict: tensors on the CPU by name: ``backbone.*`` with ``contrastive_head.*`` (pretext, moco) or
            ``cluster_head.{h}.*`` (scan, selflabel).
        head: the best head of a ``scan`` file, None if it has several and does not say; 0 for ``selflabel``; None
            without cluster heads.
    """

    kind: Kind
    state_dict: dict[str, Tensor]
    head: int | None

    @property
    def architecture(self) -> Literal["resnet18", "resnet50"]:
        """The network's family. Whether a ResNet-18 has the CIFAR or the STL stem does not show in its weights."""
        return "resnet50" if "backbone.layer1.0.conv3.weight" in self.state_dict else "resnet18"

    @property
    def n_heads(self) -> int:
        """The number of cluster heads, 0 for pretext weights."""
        return len(_heads(self.state_dict))

    @property
    def n_clusters(self) -> int | None:
        """The clusters of each head, or None for pretext weights."""
        return self.state_dict["cluster_head.0.weight"].shape[0] if self.n_heads else None

    @property
    def n_features(self) -> int:
        """The size of the backbone's features."""
        name = "layer4.0.conv3.weight" if self.architecture == "resnet50" else "layer4.0.conv2.weight"
        entry = self.state_dict.get(f"backbone.{name}")
        return 0 if entry is None else entry.shape[0]

    @property
    def projector(self) -> dict[str, Any]:
        """The settings of ``model`` that describe the projector; {} with cluster heads."""
        if self.n_heads:
            return {}
        last = self.state_dict.get("contrastive_head.2.weight")
        if last is None:
            last = self.state_dict.get("contrastive_head.weight")
            return {} if last is None else {"projector": "linear", "projection_dim": last.shape[0], "hidden_dim": None}
        hidden = None if last.shape[1] == self.n_features else last.shape[1]
        return {"projector": "mlp", "projection_dim": last.shape[0], "hidden_dim": hidden}

    def best_head(self, head: int | None = None) -> int:
        """Return the index of the head to use: the given one, or else the file's best.

        Raises:
            WeightsError: if there are no heads, there is no such head, or the file does not say which is the best.
        """
        if not self.n_heads:
            raise WeightsError(
                f"it is a {self.kind} file, which has no cluster heads; `scan-fast embed` writes its features, "
                "`scan-fast cluster --from` trains heads"
            )
        chosen = self.head if head is None else head
        if chosen is None:
            raise WeightsError(
                f"it has {self.n_heads} cluster heads and does not say which is the best: name one with --head H, "
                f"H from 0 to {self.n_heads - 1} (`scan-fast evaluate` compares them)"
            )
        if not 0 <= chosen < self.n_heads:
            raise WeightsError(f"it has the cluster heads 0 to {self.n_heads - 1}, there is no head {chosen}")
        return chosen

    def with_head(self, head: int | None = None) -> dict[str, Tensor]:
        """Return the backbone and one head, as head 0.

        Args:
            head: as in :meth:`best_head`.

        Raises:
            WeightsError: as :meth:`best_head`.
        """
        own = f"cluster_head.{self.best_head(head)}."
        kept = {name: value for name, value in self.state_dict.items() if name.startswith(("backbone.", own))}
        return {name.replace(own, "cluster_head.0.", 1): value for name, value in kept.items()}


def read_original(path: str | Path) -> OriginalWeights:
    """Read a weight file of the original project, or the official MoCo v2 checkpoint.

    Args:
        path: the file, in the zip format of today's PyTorch or the older one.

    Raises:
        WeightsError: if there is no such file, or for one that is damaged, holds anything but tensors and plain values,
            or holds names that none of the four kinds has.
    """
    path = Path(path)
    content = read_checkpoint(path)
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__} where a dict of weights is expected")
    if {"format", "n_clusters", "view_size"} <= set(content):
        raise WeightsError(f"{path} is a model of scan-fast, which knows its images: it needs no configuration")
    if "state_dict" in content:
        return OriginalWeights("moco", _from_moco(path, _tensors(path, content["state_dict"])), None)
    head: int | None = None
    tensors = content
    if "model" in content:
        unknown = set(content) - {"model", "head", "optimizer", "epoch", "best_loss", "best_loss_head"}
        if unknown:
            raise WeightsError(f"{path} has unknown entries {_some(unknown)} beside 'model'")
        head = _head(path, content)
        tensors = content["model"]
    state_dict = _without_module(_tensors(path, tensors))
    kind: Kind = _kind(path, state_dict, head)
    if kind == "pretext":
        return OriginalWeights(kind, state_dict, None)
    return OriginalWeights(kind, state_dict, 0 if kind == "selflabel" else head)


def load_original(
    module: nn.Module, original: OriginalWeights, state_dict: Mapping[str, Tensor], path: Path, model: ModelConfig
) -> None:
    """Fill a model with weights of a file; a file of another network is refused in words.

    Args:
        module: the model; it is left untouched if an error is raised.
        original: the content of the file.
        state_dict: the part of it that the model takes; every name and shape must agree.
        path: the file, for errors.
        model: the settings that the model was built from.

    Raises:
        WeightsError: if the weights do not fit.
    """
    try:
        load_strict(module, state_dict, what=f"the weights of {path}")
    except WeightsError as error:
        reason = _misfit(original, model)
        if reason:
            raise WeightsError(f"{path} holds {reason}") from error
        raise


def _misfit(original: OriginalWeights, model: ModelConfig) -> str:
    """Return in which way a file is of another network than the configuration's; "" if only names of tensors tell."""
    found = {"resnet18": "a ResNet-18", "resnet50": "a ResNet-50"}[original.architecture]
    fitting = {"resnet18": ("resnet18_cifar", "resnet18_stl"), "resnet50": ("resnet50",)}[original.architecture]
    if model.backbone not in fitting:
        return f"{found}, which is model.backbone={' or '.join(fitting)}; the configuration has {model.backbone}"
    stem = original.state_dict.get("backbone.conv1.weight")
    wanted = scaled_channels(64, model.width)
    if original.architecture == "resnet18" and stem is not None and stem.shape[0] != wanted:
        width = stem.shape[0] / 64
        return (
            f"{found} with {stem.shape[0]} channels at first, the configuration has {wanted}; set model.width={width:g}"
        )
    wrong = {key: value for key, value in original.projector.items() if getattr(model, key) != value}
    if wrong:
        now = ", ".join(f"model.{key}={getattr(model, key)}" for key in wrong)
        return f"another projector than {now}: set {' '.join(f'model.{key}={value}' for key, value in wrong.items())}"
    return ""


def check_clusters(original: OriginalWeights, path: Path, n_clusters: int, head: int | None) -> int:
    """Refuse a file without the cluster head to go on with.

    Args:
        original: the content of the file.
        path: the file, for errors.
        n_clusters: the clusters that the head must have.
        head: the index of the head; None: the file's best one.

    Returns:
        The index of the head.

    Raises:
        WeightsError: if there is no such head, or it has another number of clusters.
    """
    try:
        chosen = original.best_head(head)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    if original.n_clusters != n_clusters:
        raise WeightsError(
            f"{path} has {original.n_clusters} clusters, the configuration has clustering.n_clusters={n_clusters}"
        )
    return chosen


def _tensors(path: Path, entries: Any) -> dict[str, Tensor]:
    if not isinstance(entries, Mapping) or not entries:
        given = "none" if entries == {} else f"a {type(entries).__name__}"
        raise WeightsError(f"{path} holds no weights: expected names and tensors, got {given}")
    wrong = [str(name) for name, value in entries.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if wrong:
        raise WeightsError(f"{path} has entries that are no tensors: {_some(wrong)}")
    counts = ("num_batches_tracked", "queue_ptr")
    wrong = [name for name, value in entries.items() if not (value.is_floating_point() or name.endswith(counts))]
    if wrong := sorted({*wrong, *unusable_entries(entries)}):
        raise WeightsError(f"{path} has entries that are not plain real numbers: {_some(wrong)}")
    return {name: value.detach() for name, value in entries.items()}


def _head(path: Path, content: Mapping[str, Any]) -> int | None:
    values = [content[key] for key in ("head", "best_loss_head") if key in content]
    if not values or values[0] is None:
        return None
    value = values[0]
    if isinstance(value, Tensor | np.ndarray) and value.ndim == 0:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise WeightsError(f"{path}: the index of the best head must be a whole number, got {value!r}")
    return int(value)


def _without_module(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."  # DataParallel's
    if all(name.startswith(prefix) for name in state_dict):
        return {name.removeprefix(prefix): value for name, value in state_dict.items()}
    return state_dict


def _heads(state_dict: Mapping[str, Tensor]) -> set[int]:
    return {int(match.group(1)) for name in state_dict if (match := _CLUSTER.fullmatch(name))}


def _kind(path: Path, state_dict: Mapping[str, Tensor], head: int | None) -> Kind:
    unknown = [name for name in state_dict if not any(p.fullmatch(name) for p in (_BACKBONE, _PROJECTOR, _CLUSTER))]
    if unknown:
        raise WeightsError(f"{path} has names that neither the original project nor MoCo uses: {_some(unknown)}")
    if not any(name.startswith("backbone.") for name in state_dict):
        raise WeightsError(f"{path} holds no backbone")
    heads = _heads(state_dict)
    projector = any(_PROJECTOR.fullmatch(name) for name in state_dict)
    if not heads:
        if not projector:
            raise WeightsError(f"{path} holds neither a contrastive head nor cluster heads")
        if head is not None:
            raise WeightsError(f"{path} names a best cluster head, {head}, but holds no cluster heads")
        return "pretext"
    if projector:
        raise WeightsError(f"{path} holds both a contrastive head and cluster heads")
    if heads != set(range(len(heads))):
        raise WeightsError(f"{path} has the cluster heads {sorted(heads)}, which do not count from 0")
    parts = [f"cluster_head.{h}.{part}" for h in sorted(heads) for part in ("weight", "bias")]
    if missing := [name for name in parts if name not in state_dict]:
        raise WeightsError(f"{path} lacks {_some(missing)}")
    if wrong := [name for name in parts if state_dict[name].shape[:1] != state_dict["cluster_head.0.bias"].shape]:
        raise WeightsError(f"{path} has heads with different numbers of clusters: {_some(wrong)}")
    if (n_clusters := len(state_dict["cluster_head.0.bias"])) < 2:
        raise WeightsError(f"{path} has heads of {n_clusters} clusters; at least 2 are needed")
    if head is None:
        return "scan" if len(heads) > 1 else "selflabel"
    if head not in heads:
        plural = "" if len(heads) == 1 else "s"
        raise WeightsError(f"{path} names the best head {head}, but has {len(heads)} head{plural}, counted from 0")
    return "scan"


def _from_moco(path: Path, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    encoder, projector = "module.encoder_q.", "module.encoder_q.fc."
    result: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, value in state_dict.items():
        if name.startswith(projector):
            new_name = "contrastive_head." + name.removeprefix(projector)
        elif name.startswith(encoder):
            new_name = "backbone." + name.removeprefix(encoder)
        elif _MOCO_OTHER.fullmatch(name):
            continue
        else:
            new_name = ""
        if _BACKBONE.fullmatch(new_name) or _PROJECTOR.fullmatch(new_name):
            result[new_name] = value
        else:
            unknown.append(name)
    if unknown:
        raise WeightsError(f"{path} has names that MoCo does not use: {_some(unknown)}")
    if not result:
        raise WeightsError(f"{path} holds no query encoder ({encoder}*)")
    return result


def _some(names: Any) -> str:
    ordered = sorted(repr(str(name)) for name in names)
    return ", ".join(ordered[:6]) + (f" and {len(ordered) - 6} more" if len(ordered) > 6 else "")
