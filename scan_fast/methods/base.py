"""Interface of a pretext method: which views of an image it wants, its loss, and what it keeps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from ..errors import ConfigError
from ..models.backbones import ModelConfig
from ..models.heads import PretextModel
from ..models.pretrained import InputFormat
from ..schema import Settings
from ..views.parameters import View


class PretextMethod(ABC):
    """Learns a representation without labels.

    The pretext stage owns the image order, the optimiser, precision and checkpoints. It calls :meth:`views` and
    :meth:`loss` in every step.

    Attributes:
        model: backbone and projector; the stage trains and checkpoints it.
    """

    def __init__(self, model: PretextModel) -> None:
        self.model = model

    @abstractmethod
    def views(self, epoch: int, epochs: int) -> Sequence[View]:
        """Return the views to render of each image in ``epoch`` (from 0) of ``epochs``. Their sizes may differ."""

    @abstractmethod
    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar to minimise, and scalars on the device to average over the epoch (with "loss").

        With several ranks (:func:`scan_fast.distributed.several`) a batch is spread over them, with as many images on
        each, in the order of the ranks. The mean over the ranks of the loss, and of the gradients, must be that of the
        whole batch. A mean over images is right as it is. What compares images needs those of all ranks, as the losses'
        ``gather_distributed`` does.

        Args:
            images: one tensor (B, 3, S, S) per view, in the order of :meth:`views`; with several ranks, of this one.
        """

    def modules(self) -> list[nn.Module]:
        """Return modules besides the model that the optimiser updates, such as a predictor. Keep them in the state."""
        return []

    def after_step(self) -> None:  # noqa: B027
        """Run after every update, for example to move an average."""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold besides the model: plain values and tensors."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Restore what :meth:`state` returned."""


class MethodSettings(Settings):
    """Base of a method's settings. A subclass has a ``kind`` and implements one of :meth:`build` and :meth:`load`."""

    kind: str
    trains: ClassVar[bool] = True
    """Whether the method trains; if not, the stage calls :meth:`load` instead of :meth:`build`."""
    least_images: ClassVar[int] = 1
    """Images that a batch must have for the method to learn; :meth:`for_run` refuses fewer training images."""

    def check(self, model: ModelConfig, features: str) -> None:
        """Refuse settings that do not fit the rest of the configuration.

        Args:
            model: the ``model`` section.
            features: ``mining.features``, the space in which neighbours are searched.

        Raises:
            ValueError: says what would be right.
        """

    def side(self, size: int) -> int:
        """Return the largest side in pixels of an image that the network sees in training, for sources of ``size``."""
        return size

    def passes(self, size: int) -> float:
        """Return the pixels of an image that pass the network in an epoch, in units of a view of :meth:`side`.

        Plans of a run's time use it. Two views of full size by default.
        """
        return 2.0

    def input_format(self) -> InputFormat | None:
        """Return the input format of the weights that the method brings, None if it brings none or they have none."""
        return None

    def for_run(self, images: int, steps: int) -> Self:
        """Return the settings of a run, with those filled in that depend on its size.

        Args:
            images: number of training images.
            steps: number of updates of the whole training.

        Raises:
            ConfigError: if the settings do not fit so many images.
        """
        if self.trains and images < self.least_images:
            raise ConfigError(
                f"pretext.method={self.kind} compares the images of a batch, so it needs at least {self.least_images} "
                f"images to train on, got {images}"
            )
        return self

    def build(self, model: PretextModel, size: int) -> PretextMethod:
        """Create the method for a model and a source of ``size`` pixels."""
        raise NotImplementedError(f"{type(self).__name__} does not train")

    def load(self, model: PretextModel) -> None:
        """Fill a model with finished weights, or leave it as it is."""
        raise NotImplementedError(f"{type(self).__name__} trains")
