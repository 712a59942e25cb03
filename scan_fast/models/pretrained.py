"""Input format of pretrained backbones: the normalisation and the size that their weights were trained with."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .backbones import ModelConfig, timm_library

Triple = tuple[float, float, float]

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class InputFormat:
    """Images as a set of weights expects them.

    Attributes:
        mean, std: per-channel normalisation in [0, 1].
        size: side of the square images in pixels, for information; None if it is not known.
        interpolation: name of the resampling filter, for information.
    """

    mean: Triple
    std: Triple
    size: int | None = None
    interpolation: str = "bilinear"


def pretrained_input(config: ModelConfig) -> InputFormat | None:
    """Return the input format of the published weights that a model starts from, None without ``pretrained``.

    Nothing is downloaded: the libraries that own the weights describe them.

    Raises:
        ConfigError: if the library has no pretrained weights of that name.
        MissingPackageError: for ``timm:NAME`` if timm is not installed.
    """
    if not config.pretrained:
        return None
    library, name = config.backbone.split(":", 1)
    return _torchvision_input(name) if library == "torchvision" else _timm_input(name)


def _torchvision_input(name: str) -> InputFormat:
    from torchvision.models import get_model_weights

    try:
        transform = get_model_weights(name).DEFAULT.transforms()
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"torchvision has no pretrained weights for {name!r}: {error}") from error
    return InputFormat(
        _triple(transform.mean), _triple(transform.std), int(transform.crop_size[0]), transform.interpolation.value
    )


def _timm_input(name: str) -> InputFormat:
    settings = timm_library(name).models.get_pretrained_cfg(name)
    if settings is None:
        raise ConfigError(f"timm has no pretrained weights for {name!r}")
    return InputFormat(_triple(settings.mean), _triple(settings.std), settings.input_size[-1], settings.interpolation)


def _triple(values: object) -> Triple:
    first, second, third = (float(value) for value in values)  # type: ignore[attr-defined]
    return first, second, third
