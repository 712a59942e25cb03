"""Uses a finished run: assigns new images to its clusters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data.datasets import DataConfig, source_from
from .data.sources import Source
from .models.backbones import ModelConfig
from .models.heads import ClusterModel
from .models.weights import load_strict
from .stages.results import MODEL_FORMAT
from .training.inference import forward_views
from .views.maker import ViewMaker
from .views.parameters import PlainView
from .views.renderers import renderer_for


class Predictor:
    """A trained cluster model together with what it needs to know about its images.

    Attributes:
        n_clusters: the number of clusters.
        size: images are brought to size x size before anything else.
    """

    def __init__(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self.state = state
        self.device = torch.device(device)
        self.n_clusters: int = state["n_clusters"]
        self.size: int = state["size"]
        self.model = ClusterModel(ModelConfig.model_validate(state["model"]), self.n_clusters)
        load_strict(self.model, state["state_dict"], what="model.pt")
        self.model = self.model.to(self.device).to(memory_format=torch.channels_last).eval()
        self._renderer = renderer_for("auto", tuple(state["mean"]), tuple(state["std"]), self.device)
        self._view = PlainView(kind="plain", size=state["view_size"])

    def __reduce__(self) -> tuple[Any, ...]:
        # The renderer and the network are made of the state, which holds plain values and tensors on the CPU.
        return _unpickled, (self.state, str(self.device))

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Predictor:
        """Read a model.pt, or the run folder that holds it.

        Raises:
            ValueError: where the file is missing or of another kind.
        """
        path = Path(path).expanduser()
        path = path / "model.pt" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"there is no model at {path}; give a finished run folder or its model.pt")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as a model of scan-fast: {error}") from error
        if not isinstance(state, dict) or state.get("format") != MODEL_FORMAT:
            raise ValueError(f"{path} is no model.pt of scan-fast (format {MODEL_FORMAT})")
        # Files from before there were these settings: what was done then.
        return cls({"crop": "image", "decode": "exact", **state}, device)

    def source(self, images: Any) -> Source:
        """Open images, see :func:`.data.datasets.source_from`, as those that the model was trained on.

        Files are decoded as they are needed: each is seen once.

        Raises:
            DataError: for images that cannot be read.
        """
        config = {
            "image_size": self.size,
            "resident": "files",
            "crop": self.state["crop"],
            "decode": self.state["decode"],
        }
        return source_from(images, DataConfig.model_validate(config))

    def save(self, path: str | Path) -> None:
        """Write a model.pt."""
        torch.save(self.state, Path(path).expanduser())

    def probabilities(self, source: Source, batch_size: int = 512) -> Tensor:
        """Return (N, K) float32 probabilities of the source's images."""
        return self._forward(source, batch_size, features=False).softmax(dim=1)

    def features(self, source: Source, batch_size: int = 512) -> Tensor:
        """Return (N, D) float32 backbone features of the source's images."""
        return self._forward(source, batch_size, features=True)

    def _forward(self, source: Source, batch_size: int, *, features: bool) -> Tensor:
        views = ViewMaker(source, self._renderer, 0, "evaluation", self.state["crop"])
        function = self.model.features if features else lambda images: self.model(images)[0]
        return forward_views(self.model, function, views, self._view, batch_size).cpu()


def _unpickled(state: dict[str, Any], device: str) -> Predictor:
    """Return a pickled predictor on its device, or on the CPU if this machine has no such device."""
    there = torch.device(device)
    missing = there.type == "cuda" and (there.index or 0) >= torch.cuda.device_count()
    with torch.random.fork_rng(devices=[]):  # the new network draws weights, which are then replaced
        return Predictor(state, "cpu" if missing else there)
