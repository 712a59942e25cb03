"""Image clustering by scikit-learn's contract: ``ImageClusterer(n_clusters=12).fit("my_photos").labels_``."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted
from torch import Tensor
from typing_extensions import Self

from .data.datasets import source_from, split_source
from .devices import choose_device
from .errors import ConfigError, DataError
from .predictor import Predictor
from .runs.config import Config, find_config, load_config
from .runs.effects import check_effects
from .runs.folder import RunFolder
from .runs.tracker import Tracker
from .stages.pipeline import run_stages, stages_of
from .training.context import data_settings, open_context, weights_input
from .training.process import set_threads

LIST_SIDE = 128
"""Largest default side, in pixels, of images that are given as a list of arrays or PIL images."""

_OWN_PARAMETERS = {"preset": "preset", "seed": "random_state", "clustering.n_clusters": "n_clusters"}
"""Configuration keys that have a parameter of the constructor, with its name."""


class ImageClusterer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Group images without labels.

    A scikit-learn estimator: a clusterer (``labels_``, ``fit_predict``, ``predict``) and a transformer to features, so
    that it works with ``clone``, in a ``Pipeline``, and with pickle and joblib. Fitting runs the stages of
    ``scan-fast run --data``: representation learning, neighbour mining, clustering and self-labelling. The same
    parameters and images give the same bits on the same machine. ``fit_predict``, ``fit_transform`` and
    ``get_feature_names_out`` are those of scikit-learn.

    ``X`` is, in every method, one of:

    - a folder (str or Path), searched with its sub-folders in sorted order;
    - images in containers, as ``data.source`` names them: ``"hf:DATASET"``, ``"webdataset:SHARDS"``,
      ``"parquet:GLOB"``;
    - a list, tuple, 1-D array or Series of files (str or Path);
    - an array or tensor of shape (N, H, W, 3), (N, H, W, 1) or (N, H, W), dtype uint8;
    - a list of PIL images, (H, W), (H, W, 1) or (H, W, 3) uint8 arrays, or uint8 tensors, which may differ in size;
    - a torch ``Dataset`` with a length, whose items are images, or tuples that start with an image.

    Images are cut to their centre square and resized to ``data.image_size`` pixels. Its default is chosen while
    fitting: that of the weights that the model starts from, if there are any; else the images' own size for arrays and
    tensors; 32, 64, 96 or 128 by the median shorter side for files and containers; the median shorter side, at most
    128, for lists of images; the first image's shorter side for a Dataset.

    Args:
        n_clusters: Number of clusters, at least 2, or ``"auto"`` for the number that scores best without labels.
        preset: ``"fast"`` or ``"paper"``, which train from scratch, ``"pretrained"``, which groups the features of a
            pretrained network, or ``"descriptor"``, which groups edges and colours: the presets of
            ``configs/folder.yaml``.
        random_state: Seed of everything random. A non-negative int is the seed itself, as ``seed=`` of ``scan-fast
            run``. A ``numpy.random.RandomState``, or None for NumPy's global one, draws a new seed in every fit; it is
            ``summary_["seed"]``.
        out: Run folder to keep. An interrupted fit on the same images continues there. None uses a temporary folder.
        settings: Further configuration by dotted keys, e.g. ``{"pretext.epochs": 50, "data.image_size": 64}``;
            ``docs/configuration.md`` lists all of them.
        verbose: Print progress. Otherwise the same lines go to the logger ``scan_fast`` at level INFO.

    Attributes:
        labels_: (N,) int64, cluster of each image, in the order of ``X``.
        probabilities_: (N, n_clusters) float32, probability of each cluster; rows sum to 1.
        n_clusters_: Number of clusters.
        summary_: Summary of the run: the seed, and metrics and seconds by stage.
        predictor_: The trained model.

    Example:
        >>> clusterer = ImageClusterer(n_clusters=12).fit("my_photos")    # doctest: +SKIP
        >>> clusterer.labels_, clusterer.predict("new_photos")            # doctest: +SKIP
    """

    def __init__(
        self,
        n_clusters: int | str,
        *,
        preset: str = "fast",
        random_state: int | np.random.RandomState | None = 0,
        out: str | Path | None = None,
        settings: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.preset = preset
        self.random_state = random_state
        self.out = out
        self.settings = settings
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> Self:
        """Train on images.

        Every image is trained on. With ``data.test_fraction`` above 0 in ``settings``, so many are held out, and the
        best head and the metrics are those of the held-out images. They get a cluster like all others.

        Args:
            X: Images, see the class.
            y: Ignored. Labels of a folder or Dataset are used for the metrics of ``summary_`` only.

        Returns:
            The estimator itself.

        Raises:
            ValueError: For parameters, settings or images that cannot be used.
            RunError: If ``out`` holds a run of another configuration or on other images, or if training diverges.
        """
        config = self._config()
        images = _as_images(X)
        opened = data_settings(config, weights_input(config))
        if isinstance(images, _ImageList) and opened.image_size is None:
            data = config.data.model_copy(update={"image_size": images.default_side()})
            config = config.model_copy(update={"data": data})
            opened = data_settings(config, weights_input(config))
        with _process_state(config.runtime.threads):
            source = source_from(images, opened)
            splits = split_source(source, config.data)
            with tempfile.TemporaryDirectory(prefix="scan-fast-") as temporary:
                run = RunFolder.open(Path(self.out) if self.out is not None else Path(temporary) / "run", config)
                with run:
                    tracker = Tracker(run, quiet=not self.verbose)
                    context = open_context(config, run, tracker, splits)
                    run_stages(context, stages_of(context))
                predictor = Predictor.load(run.path, choose_device(config.runtime.device))
                summary = run.summary().to_dict()
            probabilities = predictor.probabilities(source).numpy()
        self._use(predictor, config.runtime.threads)
        self.summary_ = summary
        self.probabilities_ = probabilities
        self.labels_: np.ndarray = probabilities.argmax(axis=1)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the most probable cluster of each image, (N,) int64.

        Raises:
            NotFittedError: Before :meth:`fit` or :meth:`load`.
            ValueError: For images that cannot be used.
        """
        return np.asarray(self.predict_proba(X).argmax(axis=1))

    def predict_proba(self, X: Any) -> np.ndarray:
        """Return the probability of each cluster, (N, n_clusters) float32.

        Raises:
            NotFittedError: Before :meth:`fit` or :meth:`load`.
            ValueError: For images that cannot be used.
        """
        check_is_fitted(self)
        with _process_state(self._n_threads):
            return self.predictor_.probabilities(self.predictor_.source(_as_images(X))).numpy()

    def transform(self, X: Any) -> np.ndarray:
        """Return the backbone's features, (N, D) float32.

        Raises:
            NotFittedError: Before :meth:`fit` or :meth:`load`.
            ValueError: For images that cannot be used.
        """
        check_is_fitted(self)
        with _process_state(self._n_threads):
            return self.predictor_.features(self.predictor_.source(_as_images(X))).numpy()

    def save(self, path: str | Path) -> None:
        """Write the trained model as a ``model.pt`` file, as a run does.

        Raises:
            NotFittedError: Before :meth:`fit` or :meth:`load`.
        """
        check_is_fitted(self)
        self.predictor_.save(path)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a ``model.pt`` file, or that of a run folder.

        The estimator predicts and transforms. It has no ``labels_``, ``probabilities_`` or ``summary_``, since these
        are not part of the file.

        Raises:
            ValueError: If the file is missing or holds something else.
        """
        with _process_state(None):
            predictor = Predictor.load(path)
        clusterer = cls(predictor.n_clusters)
        clusterer._use(predictor, None)
        return clusterer

    def _use(self, predictor: Predictor, n_threads: int | None) -> None:
        self.predictor_ = predictor
        self.n_clusters_ = predictor.n_clusters
        self._n_threads = n_threads

    def _config(self) -> Config:
        """Return the configuration that the parameters ask for."""
        number = self.n_clusters
        if number != "auto" and (not isinstance(number, Integral) or isinstance(number, bool) or number < 2):
            raise ConfigError(f"n_clusters must be an integer of at least 2 or 'auto', got {number!r}")
        if self.settings is not None and not isinstance(self.settings, Mapping):
            raise ConfigError(
                f"settings must map dotted keys to values, as {{'pretext.epochs': 50}}, got {self.settings!r}"
            )
        settings = dict(self.settings or {})
        for key, parameter in _OWN_PARAMETERS.items():
            if key in settings:
                raise ConfigError(f"settings must not hold {key!r}; use the parameter {parameter} instead")
        own = {
            "preset": self.preset,
            "seed": self._seed(),
            "clustering.n_clusters": number if number == "auto" else int(number),
        }
        config = load_config(find_config("folder"), (), {**own, **settings})
        check_effects(config, settings.items())
        return config

    def _seed(self) -> int:
        """Return the run's seed: an int as it is, or one drawn from a generator."""
        if isinstance(self.random_state, Integral):
            if self.random_state < 0:
                raise ConfigError(f"random_state must not be negative, got {self.random_state}")
            return int(self.random_state)
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    @property
    def _n_features_out(self) -> int:
        """Number of features, for ``get_feature_names_out``."""
        return self.predictor_.model.out_features

    def __sklearn_tags__(self) -> Any:
        """Return scikit-learn's tags (1.6 and newer): input is images and is checked here, not by scikit-learn."""
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        tags.no_validation = True
        tags.transformer_tags.preserves_dtype = []
        return tags


@contextmanager
def _process_state(threads: int | None) -> Iterator[None]:
    """Use as many threads as a run with ``runtime.threads`` does; restore torch's thread count and generator after."""
    before = torch.get_num_threads()
    set_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):  # new networks draw weights, which are then replaced
            yield
    finally:
        torch.set_num_threads(before)


# -- images as users give them -----------------------------------------------------------------------------------------


class _ImageList(Sequence[Any]):
    """Images of any sizes, as a sequence that a source can read. Items are checked when they are read."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        item = self._items[index]
        if not isinstance(item, (Image.Image, np.ndarray, Tensor)):
            raise DataError(
                "a list of images must hold file paths only, or PIL images, arrays and tensors only; "
                f"item {index} is {type(item).__name__}"
            )
        if not isinstance(item, Image.Image):
            _check_uint8(item, f"item {index}")
        return item

    def default_side(self) -> int:
        """Return the median shorter side in pixels, at most LIST_SIDE."""
        sides = []
        for item in self:
            shape = item.size if isinstance(item, Image.Image) else tuple(item.shape)
            # A tensor may be (C, H, W) and an array (H, W, C): channels are 1 or 3, and come first or last.
            if len(shape) == 3:
                shape = shape[1:] if isinstance(item, Tensor) and shape[0] in (1, 3) else shape[:2]
            sides.append(min(shape, default=0))
        return max(1, min(LIST_SIDE, sorted(sides)[len(sides) // 2]))


def _as_images(X: Any) -> Any:
    """Return images as :func:`scan_fast.data.source_from` takes them.

    Raises:
        DataError: For pixels that are not uint8 or that are channels-first; the message names the conversion.
    """
    if isinstance(X, (str, Path)):
        return X
    if isinstance(X, Tensor):
        return _check_layout(_check_uint8(X, "images"))
    if isinstance(X, Image.Image):
        raise DataError("images must be several, got one PIL image; give a list: [image]")
    if hasattr(X, "__array__"):
        X = np.asarray(X)
        if X.ndim != 1:
            return _tensor(_check_layout(_check_uint8(X, "images")))
        X = X.tolist()
    if isinstance(X, (list, tuple)) and X and not all(isinstance(item, (str, Path)) for item in X):
        return _ImageList(X)
    return X


def _check_uint8(pixels: Any, what: str) -> Any:
    """Return an array or tensor of dtype uint8; refuse others with the conversion that fits their range."""
    if pixels.dtype in (np.uint8, torch.uint8):
        return pixels
    uint8 = ".to(torch.uint8)" if isinstance(pixels, Tensor) else '.astype("uint8")'
    name = str(pixels.dtype).removeprefix("torch.")
    text = f"{what} must be uint8 in 0..255, got {name}"
    if name == "bool":
        raise DataError(f"{text}; convert them with x{uint8} * 255")
    if not name.startswith(("float", "bfloat", "int", "uint")) or 0 in pixels.shape:
        raise DataError(text)
    low, high = float(pixels.min()), float(pixels.max())
    floating = "float" in name
    if floating and low >= 0 and high <= 1:
        advice = f"convert them with (x * 255).round(){uint8}"
    elif low >= 0 and high <= 255:
        advice = f"convert them with x{'.round()' if floating else ''}{uint8}"
    else:
        advice = "scale them to 0..255 first"
    raise DataError(f"{text} in [{low:g}, {high:g}]; {advice}")


def _check_layout(pixels: Any) -> Any:
    """Return (N, H, W, C) or (N, H, W) pixels; refuse (N, C, H, W) with the conversion."""
    shape = tuple(pixels.shape)
    if len(shape) == 4 and shape[1] in (1, 3) and shape[3] not in (1, 3):
        move = "permute" if isinstance(pixels, Tensor) else "transpose"
        raise DataError(f"images must be (N, H, W, C), got {shape}; convert them with x.{move}(0, 2, 3, 1)")
    return pixels


def _tensor(pixels: np.ndarray) -> Tensor:
    """Return a tensor that shares an array's memory if it can."""
    if any(stride < 0 for stride in pixels.strides):
        pixels = pixels.copy()
    with warnings.catch_warnings():  # Sources read pixels and never write them, so a read-only array is fine.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(pixels)
