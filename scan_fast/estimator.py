"""The estimator: ``ImageClusterer(n_clusters=12).fit("my_photos")``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .data.datasets import source_from, split_source
from .devices import choose_device
from .predictor import Predictor
from .runs.config import find_config, load_config
from .runs.folder import RunFolder
from .runs.tracker import Tracker
from .stages.pipeline import run_stages, stages_of
from .training.context import open_context


class ImageClusterer:
    """Groups images without labels, with the interface of scikit-learn's clusterers.

    Args:
        n_clusters: the number of groups, at least 2.
        preset: ``"fast"`` or ``"paper"`` of the folder configuration.
        seed: decides everything random.
        out: the run folder; None uses a temporary one, which is removed after fitting.
        settings: further configuration by dotted keys, e.g. ``{"pretext.epochs": 50, "data.image_size": 64}``.
        verbose: whether to show progress.

    Attributes:
        labels_: (N,) int64, the cluster of each fitted image, in the given order.
        probabilities_: (N, K) float32.
        summary_: the run's summary: metrics and seconds per stage.

    Example:
        >>> labels = ImageClusterer(n_clusters=12).fit("my_photos").labels_    # doctest: +SKIP
    """

    def __init__(
        self,
        n_clusters: int,
        *,
        preset: str = "fast",
        seed: int = 0,
        out: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.preset = preset
        self.seed = seed
        self.out = out
        self.settings = settings
        self.verbose = verbose
        self._predictor: Predictor | None = None

    def fit(self, images: Any) -> ImageClusterer:
        """Run all stages on images: a folder, a list of files, a torch Dataset, or (N, H, W, C) uint8.

        A tenth of them is held out from training (``data.test_fraction``) to choose the best head without labels;
        they get a cluster like all others.

        Raises:
            ValueError: for settings or images that do not fit.
        """
        changes: dict[str, Any] = {
            "preset": self.preset,
            "seed": self.seed,
            "clustering.n_clusters": self.n_clusters,
            **(self.settings or {}),
        }
        config = load_config(find_config("folder"), (), changes)
        data = config.data
        source = source_from(images, data)
        splits = split_source(source, data)
        with tempfile.TemporaryDirectory(prefix="scan-fast-") as temporary:
            run = RunFolder.open(Path(self.out) if self.out is not None else Path(temporary) / "run", config)
            with run:
                tracker = Tracker(run, quiet=not self.verbose)
                context = open_context(config, run, tracker, splits)
                run_stages(context, stages_of(context))
            self._predictor = Predictor.load(run.path, choose_device(config.runtime.device))
            self.summary_ = run.summary().to_dict()
        probabilities = self._predictor.probabilities(source)
        self.probabilities_ = probabilities.numpy()
        self.labels_: np.ndarray = probabilities.argmax(dim=1).numpy()
        return self

    def fit_predict(self, images: Any) -> np.ndarray:
        """Return ``fit(images).labels_``."""
        return self.fit(images).labels_

    def predict(self, images: Any) -> np.ndarray:
        """Return the cluster (N,) int64 of each image."""
        return np.asarray(self.predict_proba(images).argmax(axis=1))

    def predict_proba(self, images: Any) -> np.ndarray:
        """Return the probability (N, K) float32 of each cluster for each image."""
        predictor = self._fitted()
        return predictor.probabilities(predictor.source(images)).numpy()

    def transform(self, images: Any) -> np.ndarray:
        """Return the features (N, D) float32 of each image."""
        predictor = self._fitted()
        return predictor.features(predictor.source(images)).numpy()

    def save(self, path: str | Path) -> None:
        """Write the fitted model, as the file model.pt of a run."""
        self._fitted().save(path)

    @classmethod
    def load(cls, path: str | Path) -> ImageClusterer:
        """Read a saved model, or that of a run folder; it predicts and transforms."""
        predictor = Predictor.load(path)
        clusterer = cls(predictor.n_clusters)
        clusterer._predictor = predictor
        return clusterer

    def _fitted(self) -> Predictor:
        if self._predictor is None:
            raise ValueError("this ImageClusterer is not fitted; call fit(images) first, or ImageClusterer.load(path)")
        return self._predictor
