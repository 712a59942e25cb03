"""The records of a run folder that are no tables: the summary, the metrics, arrays and checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from typing import Any, BinaryIO, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.saved import MOST_CLUSTERS
from ..models.weights import is_state_dict
from .reading import is_count, is_number, listed, load_arrays, load_json, load_tensors, parse_json

T = TypeVar("T")

TAKEN = "taken"
"""Key of a taken stage's entry in summary.json: from which folder, of which seed, and the seconds spent there."""
FILES = "files"
"""Key of a stage's entry in summary.json: by path, the digest of each file that the stage has read, beside weights."""


@dataclass
class Summary:
    """Results of a run.

    Attributes:
        seed: the seed of the run; None before the first stage has finished.
        stages: by finished stage, ``seconds`` and its metrics, some of them by split.
        baselines: by method, the mean and deviation of its metrics over seeds; None before they are computed.
        backbone: the content of a :class:`BackboneRecord`; None before the first stage has finished.
        images: ``count`` and ``digest`` of the images, see :class:`.images.ImageRecord`; None likewise.
    """

    seed: int | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    baselines: dict[str, dict[str, float]] | None = None
    backbone: dict[str, Any] | None = None
    images: dict[str, Any] | None = None

    @property
    def reported(self) -> str:
        """The split that the run's results are of: "test", or "train" if no image was held out."""
        return "test" if any("test" in entry for entry in self.stages.values()) else "train"

    @property
    def seconds(self) -> float:
        """The time that the stages took together."""
        return round(sum(entry["seconds"] for entry in self.stages.values()), 3)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of summary.json."""
        content = {"seed": self.seed, "stages": self.stages, "seconds": self.seconds}
        further = {"baselines": self.baselines, "backbone": self.backbone, "images": self.images}
        return content | {name: value for name, value in further.items() if value is not None}

    def dump(self, file: BinaryIO) -> None:
        """Write JSON."""
        dump_json(self.to_dict(), file)

    @classmethod
    def load(cls, file: BinaryIO) -> Summary:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        content = load_json(file)
        stages, baselines = content.get("stages"), content.get("baselines")
        if not isinstance(stages, dict) or not all(
            isinstance(entry, dict) and is_number(entry.get("seconds")) for entry in stages.values()
        ):
            raise ValueError("stages must hold the seconds and metrics of each stage")
        if not all(map(_has_sound_metrics, stages.values())):
            raise ValueError("the metrics of a split, and the purity of neighbours, must be numbers by name")
        if baselines is not None and not (
            isinstance(baselines, dict)
            and all(
                isinstance(m, dict) and all(isinstance(v, int | float) for v in m.values()) for m in baselines.values()
            )
        ):
            raise ValueError("baselines must hold the metrics of each method")
        backbone, seed = content.get("backbone"), content.get("seed")
        if not isinstance(backbone, dict | None):
            raise ValueError("backbone must hold the facts about the network")
        images = content.get("images")
        if not isinstance(images, dict | None):
            raise ValueError("images must hold the number of the images and their digest")
        if seed is not None and not is_count(seed):
            raise ValueError("seed must be a whole number")
        return cls(seed, stages, baselines, backbone, images)


def _has_sound_metrics(entry: dict[str, Any]) -> bool:
    """Return whether what a stage has measured has the form in which the report and the comparison read it."""
    for split in (entry[name] for name in ("train", "test") if name in entry):
        if not isinstance(split, dict) or not is_number(split.get("clusters_used", 0)):
            return False
        if not all(isinstance(split.get(name, 0), int | float) for name in ("confidence", "acc", "nmi", "ari", "ami")):
            return False
    purity = entry.get("purity_at", {})
    parts = [purity, *(part for part in purity.values() if isinstance(part, dict))] if isinstance(purity, dict) else []
    return bool(parts) and all(isinstance(value, dict | int | float) for part in parts for value in part.values())


@dataclass(frozen=True)
class MetricsEntry:
    """One line of metrics.jsonl.

    Attributes:
        stage: the stage's name.
        epoch: finished epochs, from 1.
        step: finished steps of the stage.
        time: seconds since 1970.
        values: the metrics by name.
    """

    stage: str
    epoch: int
    step: int
    time: float
    values: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the content of the line."""
        return {"stage": self.stage, "epoch": self.epoch, "step": self.step, "time": self.time, **self.values}

    def to_line(self) -> str:
        """Return the entry as one line of JSON, with its line feed."""
        return json.dumps(self.to_dict()) + "\n"

    @classmethod
    def from_line(cls, line: str) -> MetricsEntry:
        """Read what :meth:`to_line` returned.

        Raises:
            ValueError: for anything else, such as a line that a crash cut short.
        """
        content = parse_json(line)
        if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
            raise ValueError("a line of metrics must name its stage")
        stage = content.pop("stage")
        if not content.keys() >= {"epoch", "step", "time"} or not all(
            isinstance(x, float) or (isinstance(x, int) and abs(x) < 1 << 63) for x in content.values()
        ):
            raise ValueError("a line of metrics must hold epoch, step, time and numbers")
        epoch, step, time = (content.pop(name) for name in ("epoch", "step", "time"))
        return cls(stage, epoch, step, time, content)


def dump_metrics(entries: Sequence[MetricsEntry], file: BinaryIO) -> None:
    """Write one line per entry."""
    file.write("".join(entry.to_line() for entry in entries).encode())


def load_metrics(file: BinaryIO) -> list[MetricsEntry]:
    """Read the entries; a line that a crash cut short is left out."""
    entries = []
    for line in file.read().decode("utf-8", "replace").splitlines():
        try:
            entries.append(MetricsEntry.from_line(line))
        except ValueError:
            continue
    return entries


@dataclass(frozen=True)
class PrecisionRecord:
    """The dtype that ``precision=auto`` stands for in this run.

    Attributes:
        precision: "float32" or "bfloat16".
        reason: why, in words.
        tried: the settings that the choice was made for; other settings need another choice.
    """

    precision: str
    reason: str
    tried: dict[str, Any]

    def dump(self, file: BinaryIO) -> None:
        """Write JSON."""
        dump_json(asdict(self), file)

    @classmethod
    def load(cls, file: BinaryIO) -> PrecisionRecord:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        content = load_json(file)
        try:
            record = cls(**content)
        except TypeError as error:
            raise ValueError("it must hold precision, reason and tried") from error
        if record.precision not in ("float32", "bfloat16") or not isinstance(record.reason, str):
            raise ValueError("precision must be float32 or bfloat16, and its reason a text")
        return record


@dataclass(frozen=True)
class BackboneRecord:
    """The network of a run, the images that it sees, and the weights that it starts from.

    Attributes:
        backbone: ``model.backbone``, with ``auto`` resolved.
        network: the same with a short name spelled out.
        image_size: side of its images in pixels.
        mean, std: per-channel normalisation in [0, 1].
        interpolation: the filter that brings images to their size.
        weights: the file or publisher of the weights that it starts from; None for random ones.
        digest: BLAKE2b of their file; None if there is no file or it is not known.
        licence: of published weights, as far as it is known.
        multiply_adds: of one image.
    """

    backbone: str
    network: str
    image_size: int
    mean: list[float]
    std: list[float]
    interpolation: str
    weights: str | None
    digest: str | None
    licence: str | None
    multiply_adds: int

    def __str__(self) -> str:
        """Return the line that a run starts with."""
        name = self.network if self.backbone == self.network else f"{self.backbone} ({self.network})"
        return (
            f"{name} with {'random weights' if self.weights is None else f'weights of {self.weights}'}, "
            f"{self.image_size} x {self.image_size} pixels, {self.interpolation}, "
            f"{self.multiply_adds / 1e9:.2g} G multiply-adds an image"
        )

    def dump(self, file: BinaryIO) -> None:
        """Write JSON."""
        dump_json(asdict(self), file)

    @classmethod
    def load(cls, file: BinaryIO) -> BackboneRecord:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        content = load_json(file)
        try:
            record = cls(**content)
        except TypeError as error:
            raise ValueError(f"it must hold the facts about the network: {error}") from error
        texts = (record.backbone, record.network, record.interpolation)
        known = all(isinstance(text, str) for text in texts) and all(
            text is None or isinstance(text, str) for text in (record.weights, record.digest, record.licence)
        )
        if not known or not is_count(record.image_size) or not is_count(record.multiply_adds):
            raise ValueError("it must hold the facts about the network: texts, and whole numbers of pixels and of sums")
        return record


EMBEDDINGS_KEY = "key"
"""Name of the key in embeddings.npz."""
IMAGES_KEY = "images"
"""Name of the images' digest in results of stages."""
_ROWS = 1 << 14
"""Rows of an array that are checked at once, so that little memory is needed besides."""


def check_rows(name: str, array: NDArray[Any], dtype: type[np.generic]) -> None:
    """Refuse what is no matrix (N, D) of a dtype with finite values.

    Raises:
        ValueError: says what was found.
    """
    if array.ndim != 2 or array.dtype != dtype:
        raise ValueError(f"{name} must be (N, D) {np.dtype(dtype)}, got {array.shape} {array.dtype}")
    if array.dtype.kind == "f":
        for begin in range(0, len(array), _ROWS):
            if not np.isfinite(array[begin : begin + _ROWS]).all():
                raise ValueError(f"{name} holds values that are not finite")


@dataclass(frozen=True)
class Embeddings:
    """The embeddings of all images.

    Attributes:
        rows: by split, (N, D) float32 unit rows.
        key: a digest of everything that they depend on, if that is known before they are computed: the images, and a
            network that is not trained. Other runs with the same key use them.
        images: digest of the images, see :attr:`.images.ImageRecord.run_digest`; None if it is not known.
    """

    rows: dict[str, NDArray[np.float32]]
    key: str | None = None
    images: str | None = None

    def dump(self, file: BinaryIO) -> None:
        """Write an .npz with one array per split and, if there is one, the key."""
        texts = {EMBEDDINGS_KEY: self.key, IMAGES_KEY: self.images}
        known = {name: np.array(text) for name, text in texts.items() if text is not None}
        np.savez(file, **self.rows, **known)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: BinaryIO) -> Embeddings:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        arrays = load_arrays(file)
        key, images = (arrays.pop(name, None) for name in (EMBEDDINGS_KEY, IMAGES_KEY))
        for name, rows in arrays.items():
            check_rows(name, rows, rows.dtype.type if rows.dtype.kind == "f" else np.float32)
        return cls(arrays, None if key is None else str(key), None if images is None else str(images))


@dataclass(frozen=True)
class Neighbors:
    """The nearest neighbours of all images, without the image itself, most similar first.

    Attributes:
        index: by split, (N, k) int64 rows of the same split, -1 if there are fewer than k.
        similarity: by split, (N, k) float32 cosine similarities, minus infinity for none.
        images: digest of the images, see :attr:`.images.ImageRecord.run_digest`; None if it is not known.
    """

    index: dict[str, NDArray[np.int64]]
    similarity: dict[str, NDArray[np.float32]]
    images: str | None = None

    def dump(self, file: BinaryIO) -> None:
        """Write an .npz with the arrays SPLIT and SPLIT_similarity."""
        similarity = {f"{split}_similarity": array for split, array in self.similarity.items()}
        known = {} if self.images is None else {IMAGES_KEY: np.array(self.images)}
        np.savez(file, **self.index, **similarity, **known)  # type: ignore[arg-type]

    @classmethod
    def load(cls, file: BinaryIO) -> Neighbors:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        arrays = load_arrays(file)
        images = arrays.pop(IMAGES_KEY, None)
        similarity = {
            name.removesuffix("_similarity"): array for name, array in arrays.items() if name.endswith("_similarity")
        }
        index = {name: array for name, array in arrays.items() if not name.endswith("_similarity")}
        if index.keys() != similarity.keys():
            raise ValueError(f"every split must have its indices and similarities, got {', '.join(arrays)}")
        for name, rows in index.items():
            check_rows(name, rows, np.int64)
            own = similarity[name]
            if own.shape != rows.shape or own.dtype != np.float32 or np.isnan(own).any():
                raise ValueError(
                    f"{name}_similarity must be {rows.shape} float32 without NaN, got {own.shape} {own.dtype}"
                )
            if rows.size and (rows.max() >= len(rows) or rows.min() < -1):
                wrong = int(rows.max() if rows.max() >= len(rows) else rows.min())
                raise ValueError(f"{name} names image {wrong}; its images are numbered from 0 to {len(rows) - 1}")
        return cls(index, similarity, None if images is None else str(images))


@dataclass(frozen=True)
class SuggestedNumber:
    """The number of groups that :func:`..partitions.suggest_number` has suggested.

    Attributes:
        k: the number.
        curve: for each number that was tried {"k", "score", "stability", "way"}.
    """

    k: int
    curve: list[dict[str, Any]]

    def dump(self, file: BinaryIO) -> None:
        """Write JSON."""
        dump_json({"k": self.k, "curve": self.curve}, file)

    @classmethod
    def load(cls, file: BinaryIO) -> SuggestedNumber:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        content = load_json(file)
        k, curve = content.get("k"), content.get("curve")
        if not isinstance(k, int) or not 2 <= k <= MOST_CLUSTERS or not isinstance(curve, list):
            raise ValueError(f"it must hold k, from 2 to {MOST_CLUSTERS}, and curve")
        for point in curve:
            numbers = isinstance(point, dict) and all(
                isinstance(point.get(name), float | int) for name in ("score", "stability")
            )
            if not numbers or not is_count(point.get("k")) or not isinstance(point.get("way"), str):
                raise ValueError("each point of its curve must hold k, score, stability and way")
        return cls(k, curve)


@dataclass(frozen=True)
class ImageMap:
    """The place of each image on the map.

    Attributes:
        positions: (N, 2) float32 in [0, 1], in the order of assignments.csv.
        digest: of the embeddings that were placed; of others the map is another.
    """

    positions: NDArray[np.float32]
    digest: str

    def dump(self, file: BinaryIO) -> None:
        """Write an .npz with positions and digest."""
        np.savez(file, positions=self.positions, digest=np.array(self.digest))

    @classmethod
    def load(cls, file: BinaryIO) -> ImageMap:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        arrays = load_arrays(file)
        positions, digest = arrays.get("positions"), arrays.get("digest")
        if positions is None or digest is None or positions.shape[1:] != (2,):
            raise ValueError("it must hold positions (N, 2) and a digest")
        if positions.dtype.kind != "f" or not np.isfinite(positions).all():
            raise ValueError("its positions must be finite numbers")
        return cls(positions.astype(np.float32), str(digest))


@dataclass
class Checkpoint:
    """The state of a stage while it trains.

    Attributes:
        model: the network's state_dict.
        optimizer: the optimiser's state_dict.
        stage: further state of the stage: plain values and tensors.
        n_images: images per epoch.
        epoch: finished epochs.
        step: finished steps of the epoch that has begun.
        totals: by metric, the sum over these steps.
        seconds: the time spent so far.
        images: digest of the images, see :attr:`.images.ImageRecord.run_digest`; None if it is not known.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, Any]
    stage: dict[str, Any]
    n_images: int
    epoch: int
    step: int
    totals: dict[str, Tensor]
    seconds: float
    images: str | None = None

    def dump(self, file: BinaryIO) -> None:
        """Write a file of torch.save, for ``torch.load(weights_only=True)``."""
        torch.save(dict(vars(self)), file)

    @classmethod
    def load(cls, file: BinaryIO) -> Checkpoint:
        """Read what :meth:`dump` wrote, onto the CPU.

        Raises:
            ValueError: for anything else.
        """
        content = load_tensors(file)
        try:
            checkpoint = cls(**content)
        except TypeError as error:
            raise ValueError(f"it is no checkpoint of a stage, it holds {listed(content)}") from error
        if (
            not (is_state_dict(checkpoint.model) and is_state_dict(checkpoint.totals))
            or not (isinstance(checkpoint.optimizer, dict) and isinstance(checkpoint.stage, dict))
            or not all(map(is_count, (checkpoint.n_images, checkpoint.epoch, checkpoint.step)))
            or not is_number(checkpoint.seconds)
        ):
            raise ValueError("it is no sound checkpoint of a stage: its entries are of other kinds")
        return checkpoint


@dataclass(frozen=True)
class StageResult:
    """The result of a learned stage.

    Attributes:
        model: the network's state_dict.
        record: how the result was chosen: plain values.
        images: digest of the images, see :attr:`.images.ImageRecord.run_digest`; None if it is not known.
    """

    model: dict[str, Tensor]
    record: dict[str, Any] = field(default_factory=dict)
    images: str | None = None

    def dump(self, file: BinaryIO) -> None:
        """Write a file of torch.save, for ``torch.load(weights_only=True)``."""
        known = {} if self.images is None else {IMAGES_KEY: self.images}
        torch.save({"model": self.model, **self.record, **known}, file)

    @classmethod
    def load(cls, file: BinaryIO) -> StageResult:
        """Read what :meth:`dump` wrote, onto the CPU.

        Raises:
            ValueError: for anything else.
        """
        content = load_tensors(file)
        model, images = content.pop("model", None), content.pop(IMAGES_KEY, None)
        if not is_state_dict(model) or not isinstance(images, str | None):
            raise ValueError(f"it is no result of a stage, it holds {listed(content)}")
        if not all(isinstance(name, str) for name in content) or not is_count(content.get("head", 0)):
            raise ValueError(
                "it is no result of a stage: head must be a whole number, the index of the best cluster head"
            )
        return cls(model, content, images)


def map_tensors(value: T, function: Callable[[Tensor], Tensor]) -> T:
    """Return nested dataclasses, dictionaries, lists and tuples with ``function`` applied to every tensor."""
    result: Any = value
    if isinstance(value, Tensor):
        result = function(value)
    elif is_dataclass(value) and not isinstance(value, type):
        result = replace(value, **{name: map_tensors(inner, function) for name, inner in vars(value).items()})
    elif isinstance(value, dict):
        result = {key: map_tensors(inner, function) for key, inner in value.items()}
    elif isinstance(value, list | tuple):
        result = type(value)(map_tensors(inner, function) for inner in value)
    return cast(T, result)


def dump_json(content: dict[str, Any], file: BinaryIO) -> None:
    """Write a mapping as indented JSON."""
    file.write((json.dumps(content, indent=2) + "\n").encode())
