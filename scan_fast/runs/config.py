"""The configuration of a run: one strict model, read from YAML, changed by ``section.key=value``.

A configuration file holds the values shared by all its presets and, under ``presets``, what each preset changes::

    name: cifar10
    preset: fast            # the default
    data: {source: cifar10}
    presets:
      paper: {pretext: {epochs: 500}}
      fast: {pretext: {epochs: 200}}

A text in place of a preset's sections says why there is no such preset, and which to take.
``base: other.yaml`` takes over the values and presets of another file in the same folder. A section that is chosen by
``kind`` can be given as the bare name: ``pretext.method=none``.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from ..data.datasets import DataConfig
from ..errors import ConfigError
from ..methods import MethodConfig, SimCLRSettings
from ..models.backbones import ModelConfig
from ..models.saved import MOST_CLUSTERS
from ..objectives import ObjectiveConfig, ObjectiveSettings, SCANSettings, TURTLESettings
from ..partitions import REFINEMENTS, WAYS
from ..schema import Settings
from ..views.parameters import PlainView, StrongView, View
from .plain_yaml import DEEPEST, parse_yaml
from .problems import explain

MOST_BASES = 10
"""Files that may be based on one another."""
CONFIG_FOLDERS = (Path(__file__).parents[1] / "configs", Path(__file__).parents[2] / "configs")


class OptimizerConfig(Settings):
    """Optimizer of a stage.

    Attributes:
        name: the optimizer. ``muon`` makes the updates of hidden weights orthogonal, and is AdamW for the others.
        lr: learning rate, which the schedule multiplies. One that suits Adam suits Muon.
        momentum: momentum of SGD and Muon; Adam ignores it.
        nesterov: Nesterov momentum, for SGD; Muon always has it.
        weight_decay: weight decay; decoupled from the gradient with ``adamw`` and ``muon``.
        decay_all: also decay biases and normalization weights, as the reference does.
    """

    name: Literal["sgd", "adam", "adamw", "muon"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=1e-4, ge=0)
    decay_all: bool = True


class ScheduleConfig(Settings):
    """Factor on the learning rate: linear warm-up, then a constant, a cosine or steps.

    Attributes:
        name: shape after the warm-up.
        warmup_epochs: epochs of linear warm-up from zero; at most a fifth of all epochs count.
        floor: end of the cosine, as a fraction of the learning rate.
        decay_rate: factor of each step, for ``step``.
        decay_epochs: epochs after which a step is taken, for ``step``.
        every: change the factor at each epoch or at each training step.
    """

    name: Literal["constant", "cosine", "step"] = "constant"
    warmup_epochs: int = Field(default=0, ge=0)
    floor: float = Field(default=0.0, ge=0, le=1)
    decay_rate: float = Field(default=0.1, gt=0, le=1)
    decay_epochs: tuple[int, ...] = ()
    every: Literal["epoch", "step"] = "epoch"


class TrainingConfig(Settings):
    """Settings of every stage that trains.

    Attributes:
        epochs: passes over the training images.
        batch_size: images in a training step.
    """

    epochs: int = Field(default=100, ge=1)
    batch_size: int = Field(default=512, ge=2)
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()


class PretextConfig(TrainingConfig):
    """Stage one: a representation without labels."""

    method: MethodConfig = SimCLRSettings()
    """Choose by ``kind`` how it is learned: ``simclr``, ``moco``, ``byol``, ``sigreg``, ``visreg`` or ``rotation``;
    ``weights`` reads a file; ``none`` takes a pretrained backbone."""
    monitor_every: int = Field(default=10, ge=0)
    """Epochs between kNN checks (needs labels) on the test images, or by leaving one out; 0 for never."""
    monitor_k: int = Field(default=100, ge=1)
    """Neighbours that vote in the kNN check."""
    monitor_temperature: float = Field(default=0.1, gt=0)
    """Temperature of the kNN check's weighted vote."""


class MiningConfig(Settings):
    """Nearest neighbours in the space that stage one learned.

    Attributes:
        k: neighbours of each training image.
        test_k: neighbours of each image that serve the selection of a head: among the test images, or the first ones of
            ``k`` if there are none.
        features: space of the search: the projector's output or the backbone's features.
        backend: implementation of the search. All are exact; ``faiss`` needs the package faiss.
        files: take the neighbours from files of the reference project instead of searching: those of the training
            images, and after it those of the test images (``topk-train-neighbors.npy``, ``topk-val-neighbors.npy``).
            They must have at least ``k`` and ``test_k`` neighbours; a split without a file is searched.
    """

    k: int = Field(default=20, ge=1)
    test_k: int = Field(default=5, ge=1)
    features: Literal["projection", "backbone"] = "projection"
    backend: Literal["auto", "native", "reference", "faiss"] = "auto"
    files: tuple[Path, ...] | None = None

    @field_validator("files")
    @classmethod
    def _one_or_two(cls, files: tuple[Path, ...] | None) -> tuple[Path, ...] | None:
        if files is not None and len(files) not in (1, 2):
            raise ValueError(
                f"give the file of the training images, and perhaps that of the test images, got {len(files)}"
            )
        # A run continues from any folder.
        return None if files is None else tuple(file.expanduser().absolute() for file in files)


class ClusterTrainingConfig(TrainingConfig):
    """Settings of the stages that train clusters.

    Attributes:
        stop_when_stable: end the stage before its last epoch if, in three evaluations in a row, at most this share of
            the reported images has changed its cluster since the evaluation before. None: train all epochs.
    """

    stop_when_stable: float | None = Field(default=None, ge=0, lt=1)


class ClusteringConfig(ClusterTrainingConfig):
    """Stage two: cluster heads on pairs of an image and a neighbour."""

    n_clusters: int | Literal["auto"] | None = None
    """Number of groups. ``auto``: the one that scores best without labels (``scan-fast suggest-k``). None: as many as
    the source has classes, ``auto`` if it has none."""
    objective: ObjectiveConfig = SCANSettings()
    """Loss of the heads and score that chooses among them, by ``kind``: ``scan``, ``temi``, ``turtle``."""
    heads: int = Field(default=1, ge=1)
    """Heads that train side by side; the one with the best score is kept."""
    neighbors: int | None = Field(default=None, ge=0)
    """Number of mined neighbours to draw from; None: all. 0: pairs are two views of one image, whatever
    ``include_self`` says."""
    include_self: bool = True
    """Let an image be drawn as its own neighbour, as the reference does."""
    true_neighbors: bool = False
    """Oracle for ablations: draw only among the mined neighbours of the image's own class, by its label; an image that
    has none is paired with itself. It tells how much wrong neighbours cost. This is the only setting with which labels
    affect training, and ``summary.json`` says so."""
    update: Literal["full", "heads", "features"] = "full"
    """``full``: train the whole network. ``heads``: train the heads on a frozen backbone, on views of the images.
    ``features``: group the features of the frozen backbone in several ways (``ways``), of which the best by a score
    without labels is kept. It needs ``mining.features: backbone`` and takes seconds."""
    ways: tuple[str, ...] = tuple(WAYS)
    """With ``update: features``: the ways to group, besides k-means, which is always tried."""
    refinements: tuple[Literal["temi", "scan", "turtle"], ...] = ("temi", "scan")
    """With ``update: features``: objectives of the heads that start from the best partition; the best head by the score
    is kept. An objective of the kind of ``objective`` takes its settings, if they are not the defaults: so a prior of
    the sizes can be given."""
    cached_views: int | None = Field(default=None, ge=1)
    """With ``update: heads``: precompute the features of so many views of each image and train the heads on them. They
    take 4 bytes x images x views x feature size. None: new views in every epoch, as the reference does."""
    initialize: Literal["random", "kmeans"] = "random"
    """First weights of the heads: random, or fitted to k-means of the embeddings that were mined."""
    view: View = StrongView(kind="strong", size=None)
    """View of anchors and neighbours in training."""
    evaluate_every: int = Field(default=1, ge=1)
    """Epochs between evaluations, among which the best epoch is selected."""
    weights: Path | None = None
    """Take backbone and head from this file of the reference project (a SCAN or self-label model or checkpoint) instead
    of training them. The stages before are not needed then."""
    weights_head: int | None = Field(default=None, ge=0)
    """With ``weights``: the file's head to take; None: the one that it names as the best."""

    @field_validator("weights")
    @classmethod
    def _absolute(cls, weights: Path | None) -> Path | None:
        # A run continues from any folder.
        return None if weights is None else weights.expanduser().absolute()

    @field_validator("n_clusters", mode="before")
    @classmethod
    def _several(cls, n_clusters: Any) -> Any:
        if n_clusters is None or n_clusters == "auto":
            return n_clusters
        if not isinstance(n_clusters, int):
            raise ValueError(f"must be a whole number of at least 2, or auto, got {n_clusters!r}")
        if n_clusters == 1:
            raise ValueError("one group needs no clustering; give at least 2, got 1")
        if n_clusters < 2:
            raise ValueError(f"must be at least 2, or auto, got {n_clusters}")
        if n_clusters > MOST_CLUSTERS:
            raise ValueError(f"must be at most {MOST_CLUSTERS}, got {n_clusters}")
        return n_clusters

    @property
    def refining(self) -> dict[str, ObjectiveSettings]:
        """The objectives of ``refinements`` with their settings."""
        known: dict[str, ObjectiveSettings] = {**REFINEMENTS, "turtle": TURTLESettings(prior="estimated")}
        own = self.objective
        if own != type(own)():
            known[own.kind] = own
        return {name: known[name] for name in self.refinements}

    @property
    def trains(self) -> bool:
        """True if heads are trained on views of the images."""
        return self.update != "features"

    @property
    def saved_heads(self) -> int:
        """The number of heads in the result of the stage."""
        return self.heads if self.trains and self.weights is None else 1

    @field_validator("ways")
    @classmethod
    def _known_ways(cls, ways: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [way for way in ways if way not in WAYS]
        if unknown:
            raise ValueError(f"ways must be among {', '.join(WAYS)}, got {', '.join(unknown)}")
        return ways

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.weights is not None and not isinstance(self.n_clusters, int):
            raise ValueError(f"weights={self.weights} needs n_clusters, the number of clusters of each of its heads")
        if self.weights is not None and self.update == "features":
            raise ValueError(f"weights={self.weights} takes the place of grouping: set update=full, or leave it out")
        if self.weights is None and self.weights_head is not None:
            raise ValueError(f"weights_head={self.weights_head} needs weights, the file that has the head")
        if self.cached_views is not None and self.update != "heads":
            raise ValueError("cached_views is for update=heads only: a backbone that learns has new features each step")
        if self.true_neighbors and self.update == "features":
            raise ValueError("true_neighbors is for training on pairs; update=features has none")
        if self.true_neighbors and self.neighbors == 0:
            raise ValueError("true_neighbors chooses among mined neighbours, and neighbors=0 takes none")
        if self.objective.needs_start and self.initialize == "random":
            raise ValueError(
                "objective.prior=estimated takes the sizes of the clusters from those that the heads start from, "
                f"and initialize={self.initialize} has none; set initialize=kmeans"
            )
        return self


class SelfLabelConfig(ClusterTrainingConfig):
    """Stage three: learning from confident assignments."""

    threshold: float = Field(default=0.99, ge=0, le=1)
    """An image is confident if its largest probability is strictly above this."""
    confidence: Literal["fixed", "per_class"] = "fixed"
    """``fixed``: only ``threshold`` counts. ``per_class``: so do, in every batch, the most confident images of each
    predicted cluster (``fraction``), so that no cluster is without labels while the network is unsure."""
    fraction: float = Field(default=0.5, gt=0, le=1)
    """With ``confidence: per_class``: share of the images of each predicted cluster that is confident in any case; at
    least one image."""
    keep: Literal["best", "guarded", "last"] = "best"
    """``best``: the result is the best evaluated state, the model that stage two left included. No labels are needed:
    a state that has lost clusters is worse; otherwise that one is best in which images share their cluster with their
    mined neighbours most (by modularity). ``guarded``: the last evaluated state that has lost no cluster and at most a
    quarter of the start's modularity. ``last``: the last state, as in the reference."""
    balance: bool = True
    """Give each cluster that occurs among the confident images of a batch the same total weight."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the moving average of the weights; None: no average."""
    ema_mode: Literal["teacher", "write_back"] = "teacher"
    """``teacher``: the average gives the labels and is the result. ``write_back``: the average replaces the trained
    weights after every step, as the reference does. This multiplies the learning rate by 1 - ema and keeps the batch
    statistics of the start."""
    weak_view: View = PlainView(kind="plain", size=None)
    """View that gives the labels."""
    view: View = StrongView(kind="strong", size=None)
    """View that learns them."""
    evaluate_every: int = Field(default=10, ge=1)
    """Epochs between evaluations, among which a state is selected (``keep``)."""


class EvaluationConfig(Settings):
    """Evaluation, and comparison with k-means.

    Attributes:
        batch_size: images in a forward pass.
        baseline_seeds: runs of k-means, over which mean and deviation are reported.
        thumbnails: images with a thumbnail in the report; of more images, the same share of each group gets one.
        map: place the images on a map for the report; takes up to ten seconds.
    """

    batch_size: int = Field(default=512, ge=1)
    baselines: bool = True
    """Compare with k-means on pixels and on features, if there are labels."""
    baseline_seeds: int = Field(default=3, ge=1)
    thumbnails: int = Field(default=20_000, ge=0)
    map: bool = True


class RuntimeConfig(Settings):
    """Execution of a run. None of it belongs to the experiment, so it may change when a run is resumed.

    Attributes:
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.
        threads: threads of PyTorch on the CPU. Default: PyTorch's, but no more than the cores of the container.
        tensorboard: also write metrics for TensorBoard; needs the package tensorboard.
    """

    device: str = "auto"
    threads: int | None = Field(default=None, ge=1)
    checkpoint_seconds: float = Field(default=60.0, ge=0)
    """Longest time between checkpoints; 0 writes one after every step."""
    cuda_graphs: bool = True
    """Replay whole training steps as CUDA graphs; a step that cannot be captured runs kernel by kernel. No effect
    without a GPU."""
    compile: bool = False
    """Train through torch.compile: half a minute or more before the first step, less if its cache is warm. The cache is
    kept in TORCHINDUCTOR_CACHE_DIR, by default ~/.cache/scan-fast/compiled."""
    tensorboard: bool = False


class Config(Settings):
    """The configuration of a run.

    Attributes:
        name: name of the run in its folder's name and in the report.
        preset: preset of the configuration file that was applied.
        seed: seed of everything random.
    """

    name: str = "run"
    preset: str | None = None
    seed: int = Field(default=0, ge=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype. ``auto``: bfloat16 on a GPU, and on processors with bfloat16 products if a short trial of the
    network finds its results right. Losses and batch-norm statistics are float32 in any case."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    pretext: PretextConfig = PretextConfig()
    mining: MiningConfig = MiningConfig()
    clustering: ClusteringConfig = ClusteringConfig()
    selflabel: SelfLabelConfig | None = SelfLabelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if self.pretext.method.trains and not self.model.learns:
            raise ValueError(
                f"model.backbone={self.model.backbone} has nothing to train: set pretext.method=none, or take another "
                "backbone"
            )
        self.pretext.method.check(self.model, self.mining.features)
        if self.clustering.weights is not None and self.model.has_weights:
            raise ValueError(
                f"clustering.weights={self.clustering.weights} holds the whole network: leave model.weights and "
                "model.pretrained out"
            )
        if self.clustering.weights is not None and self.mining.files is not None:
            raise ValueError(
                f"nothing is mined after clustering.weights={self.clustering.weights}: leave mining.files out"
            )
        if self.clustering.weights is not None and self.model.cluster_head != "linear":
            raise ValueError(f"clustering.weights needs model.cluster_head=linear, got {self.model.cluster_head}")
        if self.mining.files is not None and not self.clustering.trains:
            raise ValueError("clustering.update=features searches its own neighbours: leave mining.files out")
        if self.clustering.update == "features" and self.mining.features != "backbone":
            raise ValueError("clustering.update=features groups the backbone's features: set mining.features=backbone")
        if self.clustering.update == "features" and self.model.cluster_head != "linear":
            raise ValueError(
                f"clustering.update=features gives linear heads: set model.cluster_head=linear, not "
                f"{self.model.cluster_head}"
            )
        if self.clustering.initialize == "kmeans" and self.model.cluster_head != "linear":
            raise ValueError(
                f"clustering.initialize=kmeans needs model.cluster_head=linear, got {self.model.cluster_head}"
            )
        return self

    @property
    def trains(self) -> bool:
        """True if a stage trains the network or computes gradients through it."""
        if self.clustering.weights is not None:
            return self.selflabel is not None
        return self.pretext.method.trains or self.clustering.update == "full" or self.selflabel is not None

    def why_without(self, stage: str) -> str | None:
        """Return the setting because of which a run has no such stage, in words; None if the settings allow it."""
        if stage in ("pretext", "mining", "number") and self.clustering.weights is not None:
            return f"clustering.weights={self.clustering.weights} takes its place"
        return "selflabel: null" if stage == "selflabel" and self.selflabel is None else None

    def with_seed(self, seed: int) -> Config:
        """Return the configuration with another seed."""
        return self.model_copy(update={"seed": seed})

    def to_yaml(self) -> str:
        """Return the resolved configuration as YAML that :func:`load_config` reads back."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def find_config(name: str) -> Path:
    """Return the file for a path, or for the bare name of a shipped configuration such as ``cifar10``."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs()
    # configs/NAME.yaml works from any folder. A missing NAME.yaml of another folder does not mean the shipped one.
    if path.stem in shipped and path.suffix in ("", ".yaml") and path.parent in (Path(), Path("configs")):
        return shipped[path.stem]
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    raise ConfigError(
        f"there is no configuration {name!r}{f' (did you mean {near[0]}?)' if near else ''}; "
        f"give a YAML file, a run folder or one of {', '.join(sorted(shipped))}"
    )


def shipped_configs() -> dict[str, Path]:
    """Return the files of the shipped configurations by name."""
    return {file.stem: file for folder in CONFIG_FOLDERS if folder.is_dir() for file in sorted(folder.glob("*.yaml"))}


def presets_of(path: Path) -> list[str]:
    """Return the names of the presets of a configuration file and of its base, without those it says it has not.

    Raises:
        ConfigError: if the file is no configuration.
    """
    presets = _read(path).get("presets") or {}
    if not isinstance(presets, dict):
        return []
    return [str(name) for name, change in presets.items() if not isinstance(change, str)]


def load_config(path: Path, overrides: Iterable[str] = (), changes: Mapping[str, Any] | None = None) -> Config:
    """Read a file, apply its preset, then ``changes`` (dotted keys), then ``section.key=value`` words."""
    values = _read(path)
    assigned = dict(changes or {})
    assigned.update(parse_override(text) for text in overrides)
    presets = values.pop("presets", None) or {}
    if not isinstance(presets, dict) or not all(isinstance(change, (dict, str)) for change in presets.values()):
        raise ConfigError(f"{path}: presets must hold sections under a name for each preset")
    absent = {name: presets.pop(name) for name in list(presets) if isinstance(presets[name], str)}
    preset = assigned.get("preset", values.get("preset"))
    if presets:
        if preset not in list(presets):
            known = f"it has {', '.join(map(str, presets))}"
            reason = absent[preset] if preset in list(absent) else known
            raise ConfigError(f"preset {preset!r} is not in {path.name}; {reason}")
        values = merge(values, presets[preset])
        values["preset"] = preset
    elif "preset" in assigned and assigned["preset"] != values.get("preset"):
        raise ConfigError(f"{path} has no presets, so preset={preset} cannot be chosen")
    changed = values
    for key, value in assigned.items():
        changed = merge(changed, nested(key, value))
    try:
        return Config.model_validate(changed)
    except ValidationError as error:
        refused = error
    if any(problem["type"] == "union_tag_not_found" for problem in refused.errors()):
        # A part of a view that only the defaults have, such as pretext.method.small_view.size, has their kind.
        with contextlib.suppress(ValidationError):
            return change_config(Config.model_validate(values), assigned.items())
    raise _described(refused)


def _read(path: Path, derived: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file and, beneath its values, those of the file that ``base`` names (relative to its folder)."""
    if path in derived or len(derived) > MOST_BASES:
        raise ConfigError(f"{path} is its own base: {' -> '.join(file.name for file in (*derived, path))}")
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections (data, pretext, ...), it holds {type(values).__name__}")
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise ConfigError(f"{path}: base must name a YAML file in or relative to {path.parent}, got {base!r}")
    inherited: dict[str, Any] = merge(_read(path.parent / base, (*derived, path)), values)
    return inherited


def build_config(values: Mapping[str, Any]) -> Config:
    """Validate plain values. The error names every problem with its key, and for a typo the nearest key."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _described(error) from None
    except UnicodeEncodeError as error:
        raise ConfigError(f"{error.object[:100]!a} is no text: {error.reason}") from None


def _described(error: ValidationError) -> ConfigError:
    return ConfigError("; ".join(_shortened(explain(problem, Config)) for problem in error.errors()))


def _shortened(text: str) -> str:
    # A value that was given may be of any length.
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def change_config(config: Config, changes: Iterable[tuple[str, Any]]) -> Config:
    """Return a configuration with values at dotted keys replaced, in this order."""
    values: dict[str, Any] = config.model_dump(mode="json")
    for key, value in changes:
        values = merge(values, nested(key, value))
    return build_config(values)


def parse_override(text: str) -> tuple[str, Any]:
    """Split ``section.key=value``; the value is YAML, so ``null``, ``true``, ``[1, 2]`` and numbers work."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"expected section.key=value, got {text!r}")
    try:
        parsed = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"the value of {key.strip()[:100]} is not valid YAML: {value[:100]!r} ({error})") from error
    if key.count(".") > DEEPEST:
        raise ConfigError(f"there is no key of {key.count('.') + 1} parts, such as {key.strip()[:60]!r}")
    return key.strip(), parsed


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """Turn ``a.b``, v into ``{"a": {"b": v}}``."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def merge(base: Any, change: Any) -> Any:
    """Merge nested dictionaries; a change of ``kind`` replaces the whole section, since its other keys differ."""
    if isinstance(base, dict) and "kind" in base and isinstance(change, str):
        change = {"kind": change}
    elif isinstance(base, str) and isinstance(change, dict):
        base = {"kind": base}
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    if "kind" in change and change["kind"] != base.get("kind", change["kind"]):
        return change
    return {**base, **{key: merge(base.get(key), value) for key, value in change.items()}}


MACHINE: dict[str, Any] = {"runtime": True, "data": {"resident": True, "identity": True, "workers": True}}
"""The settings that do not belong to an experiment, in the form that ``model_dump(exclude=...)`` takes."""


def differences(old: Config, new: Config) -> list[str]:
    """Return ``key: old -> new`` for every difference that would make ``new`` another experiment.

    Machine settings may change: ``runtime.*``, the placement of the images, what identifies them and the number of
    decoding threads.
    """
    before, after = (dict(flatten(c.model_dump(mode="json", exclude=MACHINE))) for c in (old, new))
    return [
        f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}"
        for key in {**before, **after}
        if before.get(key, ...) != after.get(key, ...)
    ]


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of nested dictionaries with their values."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, value
