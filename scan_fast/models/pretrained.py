"""The weights that a backbone starts from: the images that they expect, where they are, and whether they fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ..data.resize import Interpolation
from ..errors import ConfigError
from .backbones import DESCRIPTOR, OWN_BACKBONES, ModelConfig, build_backbone
from .downloads import can_be_fetched, fetch, file_at_hand, published_weights, torchvision_weights
from .published import PUBLISHED
from .timm_networks import timm_settings
from .weight_files import MisfitError, file_digest, fit_weight_file

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputFormat:
    """Images as a set of weights expects them.

    Attributes:
        mean, std: per-channel normalisation in [0, 1].
        size: side of the square images in pixels; None if it is not known.
        resize: side in pixels to which the centre square is resized, before its centre of ``size`` pixels is cut out.
        interpolation: the filter of that resize.
    """

    mean: Triple
    std: Triple
    size: int | None = None
    resize: int | None = None
    interpolation: Interpolation = "bilinear"


def pretrained_input(config: ModelConfig) -> InputFormat | None:
    """Return the input format of the weights that a model starts from, None for random weights.

    Nothing is downloaded: the libraries that own the weights describe them. A file of weights is taken to be trained as
    the library's weights of the same name, or for the project's own networks as ``data`` says.

    Raises:
        ConfigError: for ``pretrained`` if the library has no weights of that name.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
    """
    if not config.has_weights:
        return None
    if config.backbone == "resnet50":
        return _torchvision_input("resnet50", config.weights)
    library, colon, name = config.network.partition(":")
    if not colon:
        return None
    try:
        if library == "torchvision":
            return _torchvision_input(name, config.weights)
        published = PUBLISHED.get(config.backbone)
        return _timm_input(name, None if published is None else published.side)
    except ConfigError:
        if config.pretrained:
            raise
        return None


def _torchvision_input(name: str, file: Path | None) -> InputFormat:
    weights = torchvision_weights(name)
    # A file of torchvision's keeps its name, which says which of several weights it holds.
    weights = next((each for each in type(weights) if file is not None and Path(each.url).name == file.name), weights)
    transform = weights.transforms()
    size, resize = int(transform.crop_size[0]), int(transform.resize_size[0])
    return InputFormat(
        _triple(transform.mean), _triple(transform.std), size, resize, _interpolation(transform.interpolation.value)
    )


def _timm_input(name: str, side: int | None) -> InputFormat:
    settings = timm_settings(name)
    if settings is None:
        raise ConfigError(f"timm has no pretrained weights for {name!r}")
    size = side or int(settings.input_size[-1])
    centre = settings.crop_mode == "center"
    resize = math.floor(size / settings.crop_pct) if centre else size
    return InputFormat(
        _triple(settings.mean), _triple(settings.std), size, resize, _interpolation(settings.interpolation)
    )


def _interpolation(name: str) -> Interpolation:
    return "bicubic" if name == "bicubic" else "bilinear"


def _triple(values: object) -> Triple:
    first, second, third = (float(value) for value in values)  # type: ignore[attr-defined]
    return first, second, third


# -- files of the weights ---------------------------------------------------------------------------------------------


def weights_at_hand(config: ModelConfig) -> str | None:
    """Return the path of the published weights of a backbone if they are on this machine; no network is used.

    Whether the configuration asks for them makes no difference.

    Raises:
        ConfigError: if the library publishes no weights of that name.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
    """
    download = published_weights(config.network)
    found = None if download is None else file_at_hand(download)
    return None if found is None else str(found)


def can_fetch(config: ModelConfig) -> bool:
    """Return whether the published weights of a backbone can be fetched now; takes at most three seconds.

    Raises:
        ConfigError: if the library publishes no weights of that name.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
    """
    download = published_weights(config.network)
    return download is not None and can_be_fetched(download)


def weights_digest(config: ModelConfig) -> str | None:
    """Return the BLAKE2b digest of the file of the weights that a model starts from.

    Returns:
        32 hexadecimal digits; None for random weights, or if the file is not on this machine.
    """
    file = config.weights
    if config.pretrained:
        found = weights_at_hand(config)
        file = None if found is None else Path(found)
    return file_digest(file) if file is not None and file.is_file() else None


def weights_licence(config: ModelConfig) -> str | None:
    """Return the licence of published weights as far as it is known, None for random weights and files."""
    if not config.pretrained:
        return None
    published = PUBLISHED.get(config.backbone)
    if published is not None:
        return published.licence
    library, _, name = config.network.partition(":")
    settings = timm_settings(name) if library == "timm" else None
    return None if settings is None or settings.license is None else str(settings.license)


def weights_origin(config: ModelConfig) -> str | None:
    """Return the file or the publisher of the weights that a model starts from, None for random weights."""
    if config.weights is not None:
        return str(config.weights)
    download = published_weights(config.network) if config.pretrained else None
    return None if download is None else download.name


def prepare_weights(config: ModelConfig) -> list[str]:
    """Fetch the weights that a model starts from, or check that its file holds them, before anything else is done.

    Returns:
        The entries of a file that are left out, such as its classifier.

    Raises:
        ConfigError: if the library has no weights of that name.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
        WeightsError: if the weights cannot be fetched, or the file does not hold exactly this backbone.
    """
    if config.pretrained and (download := published_weights(config.network)) is not None:
        fetch(download, config.backbone)
    if config.weights is None:
        return []
    try:
        return _fit(config, config.weights)
    except MisfitError as error:
        other = _that_fits(config)
        raise (
            error if other is None else MisfitError(f"{error}; they fit {other}: set model.backbone={other}")
        ) from error


def _fit(config: ModelConfig, file: Path) -> list[str]:
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        backbone = build_backbone(config.from_scratch())
    return fit_weight_file(backbone, file, config.network).left_out


def _that_fits(config: ModelConfig) -> str | None:
    """Return a well-known backbone that the file's weights fit."""
    assert config.weights is not None
    for name in _well_known():
        if name != config.backbone:
            try:
                _fit(ModelConfig(backbone=name, weights=config.weights), config.weights)
            except (ConfigError, ImportError, MisfitError):
                continue
            return name
    return None


def _well_known() -> Iterator[str]:
    yield from (name for name in OWN_BACKBONES if name != DESCRIPTOR)
    yield from PUBLISHED
    yield from (f"torchvision:resnet{depth}" for depth in (18, 34, 101, 152))
