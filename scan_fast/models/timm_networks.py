"""Networks of the package timm: their settings, construction at a size of images, and names in older weight files."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, MissingPackageError, WeightsError


def timm_library(name: str) -> Any:
    """Return the package timm.

    Args:
        name: the model it is needed for, for the error.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import timm
    except ImportError as error:
        raise MissingPackageError(f"backbone 'timm:{name}' needs timm: pip install 'scan-fast[timm]'") from error
    return timm


def timm_settings(name: str) -> Any:
    """Return timm's record of the weights that belong to a name: input, location, licence; None if it has none.

    Raises:
        MissingPackageError: if timm is not installed.
    """
    timm = timm_library(name)
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # the network is known, the tag after the dot is not
        return None


def takes_image_size(name: str) -> bool:
    """Return whether a network is built for one size of images, such as a transformer with positions per patch."""
    settings = timm_settings(name)
    return settings is not None and bool(settings.fixed_input_size)


def timm_backbone(name: str, image_size: int | None, weights: Path | None) -> nn.Module:
    """Build a network without its classifier.

    Args:
        name: its name in timm, with or without a tag.
        image_size: side in pixels of the images that it is built for, if it is built for one size; None: timm's.
        weights: file of its published weights, or None for random ones.

    Raises:
        ConfigError: if there is no such network.
        MissingPackageError: if timm is not installed.
        WeightsError: if the file is damaged.
    """
    timm = timm_library(name)
    known = timm.list_models()
    if name.split(".", 1)[0] not in known:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"timm has no model {name!r}{hint}")
    options: dict[str, Any] = {"num_classes": 0}
    if image_size is not None and takes_image_size(name):
        options["img_size"] = image_size
    if weights is not None:
        # timm reads the file itself, without asking the Hub whether there is a newer one.
        options |= {"pretrained": True, "pretrained_cfg_overlay": _overlay(name, weights)}
    try:
        module = _create(timm, name, options)
    except ConfigError:
        raise
    except Exception as error:  # timm, safetensors and torch raise errors of many classes
        if weights is None:
            raise
        raise WeightsError(
            # timm's text may advise to read the file in a way that runs its code.
            f"{weights} is not readable as the weights of timm:{name} ({type(error).__name__}); remove it"
        ) from error
    # Some models (MobileNetV3) keep a hidden layer after the pooling when the classifier is taken off.
    settings = timm_settings(name)
    classifier = settings.classifier if settings is not None else None
    module.classifier_names = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    module.out_features = int(getattr(module, "head_hidden_size", None) or module.num_features)
    return module


def _create(timm: Any, name: str, options: dict[str, Any]) -> Any:
    if "img_size" in options:
        # With this option most transformers also take views of other sizes.
        try:
            return timm.create_model(name, dynamic_img_size=True, **options)
        except TypeError:
            pass
    try:
        return timm.create_model(name, **options)
    except (AssertionError, ValueError) as error:
        if "img_size" not in options:
            raise
        side = options["img_size"]
        raise ConfigError(
            f"timm:{name} cannot be built for images of {side} x {side} pixels ({_first_line(error)}); "
            "set data.image_size to a size that it takes, or choose another backbone"
        ) from error


def _overlay(name: str, weights: Path) -> dict[str, Any]:
    settings = timm_settings(name)
    if settings is not None and isinstance(settings.custom_load, str):
        return {}  # a format that timm reads from the Hub's cache only
    return {"file": str(weights), "custom_load": weights.suffix == ".npz"}


def converted(module: nn.Module, name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Return a state dict with timm's names and shapes, as timm itself converts files of a network's authors.

    That includes the resampling of position embeddings to the size of images that the module is built for.

    Returns:
        The converted entries, or None if timm has no conversion or it fails on these entries.
    """
    timm = timm_library(name)
    home = sys.modules[timm.models.model_entrypoint(name.split(".", 1)[0]).__module__]
    for function in ("checkpoint_filter_fn", "_filter_fn", "_filter_torchvision_pretrained"):
        convert = getattr(home, function, None)
        if convert is None:
            continue
        try:
            result = convert(dict(state_dict), module) if function == "checkpoint_filter_fn" else convert(state_dict)
        except Exception:  # these functions expect the files that they know, and fail in any way on others
            return None
        return {key: value for key, value in result.items() if isinstance(value, torch.Tensor)}
    return None


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}" if text else type(error).__name__
