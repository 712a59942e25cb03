"""Weight files of any origin, and models built from what a model.pt says."""

from __future__ import annotations

import argparse
import copy
import io
import json
import pickle
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import nn

from scan_fast.data.sources import TensorSource
from scan_fast.errors import ConfigError, MissingPackageError, WeightsError
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import ClusterModel
from scan_fast.models.reference_checkpoints import read_original
from scan_fast.models.saved import SavedModel
from scan_fast.models.weight_files import fit_weight_file
from scan_fast.predictor import Predictor

from ..archives import ZIP_TOKENS, change_pickle, change_zip, read_zip, sealed
from ..mutations import as_json, change_tree, mutate, value_of
from ..target import Target, WrongResult, write
from .artifacts import saved_tree, tensors

_SAFETENSORS_TOKENS = (
    b'"dtype":"F32"',
    b'"F8_E4M3"',
    b'"I64"',
    b'"BOOL"',
    b'"shape":[',
    b'"data_offsets":[',
    b'"__metadata__":{',
    b"[]",
    b"{}",
    b"18446744073709551615",
)


def _network() -> nn.Module:
    """Return a network of two layers with names as a ResNet has."""
    module = nn.Module()
    module.conv1 = nn.Conv2d(3, 2, 3, bias=False)
    module.bn1 = nn.BatchNorm2d(2)
    return module


class WeightFiles(Target):
    """Files of safetensors and of torch.save in both of its formats."""

    name = "weight-files"
    share = 40
    permitted = (WeightsError, MissingPackageError)

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._module = _network()
        state = self._module.state_dict()
        backbone = {f"backbone.{name}": value for name, value in state.items()}
        heads = {"cluster_head.0.weight": torch.ones(3, 2), "cluster_head.0.bias": torch.ones(3)}
        projector = {"contrastive_head.0.weight": torch.ones(2, 2), "contrastive_head.0.bias": torch.ones(2)}
        self._trees: list[Any] = [
            dict(state),
            {"model": backbone | heads, "head": 0},
            {
                "model": {f"module.{name}": value for name, value in (backbone | projector).items()},
                "optimizer": {},
                "epoch": 3,
            },
            backbone | projector,
            {"state_dict": {f"module.encoder_q.{name}": value for name, value in state.items()}, "arch": "a"},
            {"model": backbone | heads, "best_loss_head": np.int64(0), "best_loss": np.float64(0.5)},
            {"model_ema": dict(state), "args": argparse.Namespace(lr=0.1), "epoch": 1},
        ]
        self._files = [self._saved(tree, legacy) for tree in self._trees for legacy in (False, True)]
        self._safetensors = [save(dict(state)), save(dict(state), {"format": "pt"})]
        plain = {"a": [1, 2.5, "x", None, True], "b": {"c": (1, 2)}}
        self._pickles = [pickle.dumps(plain, protocol=protocol) for protocol in (0, 2, 4)]

    @staticmethod
    def _saved(tree: Any, legacy: bool) -> bytes:
        file = io.BytesIO()
        torch.save(tree, file, _use_new_zipfile_serialization=not legacy)
        return file.getvalue()

    def draw(self, rng: Random) -> Any:
        """Return the name of a file and its bytes."""
        suffix = rng.choice((".pt", ".pth.tar", ".bin", ".safetensors")) if rng.random() < 0.1 else ""
        kind = rng.random()
        if kind < 0.25:
            return f"a{suffix or '.safetensors'}", self._changed_safetensors(rng)
        if kind < 0.4:
            return f"a{suffix or '.pth'}", mutate(rng, rng.choice(self._files), self._files, ZIP_TOKENS)
        if kind < 0.6:
            data = rng.choice(self._files)
            if data.startswith(b"PK"):
                return f"a{suffix or '.pth'}", change_zip(
                    rng, read_zip(data), lambda _, content: change_pickle(rng, content)
                )
            return f"a{suffix or '.pth'}", change_pickle(rng, data, self._files)
        if kind < 0.9:
            return f"a{suffix or '.pth'}", saved_tree(rng, rng.choice(self._trees))
        return f"a{suffix or '.pkl'}", change_pickle(rng, rng.choice(self._pickles), self._pickles)

    def _changed_safetensors(self, rng: Random) -> bytes:
        data = rng.choice(self._safetensors)
        if rng.random() < 0.5:
            return mutate(rng, data, self._safetensors, _SAFETENSORS_TOKENS)
        size = int.from_bytes(data[:8], "little")
        header = change_tree(rng, json.loads(data[8 : 8 + size]))
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    def feed(self, given: Any, folder: Path) -> None:
        """Read the file as one of the reference, and as one of a backbone."""
        name, data = given
        path = write(folder, name, data)
        refused = None
        try:
            original = read_original(path)
            original.best_head(0 if original.n_heads else None)
            original.projector  # noqa: B018  (computed from the file)
        except self.permitted as error:
            refused = error
        network = ("resnet18_cifar", "timm:resnet18")[len(data) % 2]
        fitted = fit_weight_file(self._module, path, network)
        _network().load_state_dict(fitted.state_dict)
        if refused is not None:
            raise refused


class Models(Target):
    """A model.pt whose settings or weights were changed, loaded and applied."""

    name = "saved-models"
    share = 8
    permitted = (WeightsError, MissingPackageError, ConfigError)
    memory_mib = 700

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        config = ModelConfig(backbone="resnet_digits", width=0.25)
        torch.manual_seed(0)
        weights = ClusterModel(config, 2).state_dict()
        half, n_features = (0.5, 0.5, 0.5), ClusterModel(config, 2).out_features
        saved = SavedModel(
            "clustering",
            config,
            2,
            8,
            8,
            "image",
            "exact",
            half,
            half,
            weights,
            "bilinear",
            torch.ones(2, n_features),
            torch.ones(2),
        )
        file = io.BytesIO()
        saved.dump(file)
        self._tree = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        self._images = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)

    def draw(self, rng: Random) -> Any:
        """Return the bytes of a file."""
        tree = copy.copy(self._tree)
        for _ in range(rng.choice((1, 1, 2))):
            key = rng.choice([key for key in tree if key != "state_dict"])
            values = [
                *tensors(rng),
                "crop",
                "file",
                "bicubic",
                "scaled",
                16,
                3,
                1_000_000,
                2**40,
                (1.0, 2.0),
                (0.0, 0.0, 0.0),
            ]
            if key == "model" and isinstance(tree[key], dict) and rng.random() < 0.8:
                settings = dict(tree[key])
                others = [
                    "timm:resnet18",
                    "dinov2-small",
                    "auto",
                    "descriptor",
                    "resnet50",
                    "torchvision:resnet18",
                    True,
                    16,
                    "/etc/passwd",
                    "mlp",
                ]
                settings[rng.choice(list(settings))] = rng.choice((*others, value_of(rng)))
                tree[key] = settings
            else:
                tree[key] = rng.choice(values) if rng.random() < 0.6 else value_of(rng)
        if rng.random() < 0.2:
            return saved_tree(rng, tree)
        file = io.BytesIO()
        try:
            torch.save(tree, file)
        except Exception:  # a text that no pickle holds
            return b"PK"
        return file.getvalue()

    def feed(self, given: Any, folder: Path) -> None:
        """Load the model and apply it to two images."""
        predictor = Predictor.load(write(folder, "model.pt", sealed(given)))
        if predictor.size > 64 or predictor.form.view_size > 64:
            return  # accepted, but too slow to apply
        source = TensorSource(self._images, size=predictor.size)
        probabilities, features = predictor.outputs(source)
        if probabilities.shape != (2, predictor.n_clusters) or not bool(probabilities.isfinite().all()):
            raise WrongResult(f"probabilities of {predictor.n_clusters} clusters: {probabilities.tolist()}")
        if predictor.typicality is not None:
            predictor.typicality.unlike(*predictor.typicality.nearest(features))
