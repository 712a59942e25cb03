"""Settings that have no effect beside others: a user who gives one is told, instead of getting a run without it.

Configuration files may hold such settings: their presets share values that some of them do not need. What a user gives
beside a file, in words or as settings of the estimator, is meant to count.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..schema import Settings
from .config import Config, TrainingConfig, flatten

Condition = Callable[[Config, str], str | None]
"""Returns in words why a key has no effect in a configuration, None if it has one."""


@dataclass(frozen=True)
class Rule:
    """Keys that do not always count.

    Attributes:
        keys: patterns of dotted keys; a section that is chosen by ``kind`` is meant by ``SECTION.kind``.
        why_not: says why they have no effect.
    """

    keys: tuple[str, ...]
    why_not: Condition


def _of_training(*names: str, stages: tuple[str, ...] = ("pretext", "clustering", "selflabel")) -> tuple[str, ...]:
    return tuple(f"{stage}.{name}" for stage in stages for name in names)


def _training(config: Config, key: str) -> TrainingConfig:
    section: TrainingConfig = getattr(config, key.partition(".")[0])
    return section


# -- conditions --------------------------------------------------------------------------------------------------------

_WITH_TEST_SPLIT = ("digits", "cifar10", "cifar20", "stl10", "tinyimagenet", "imagenet")
_ARRAYS = ("digits", "cifar10", "cifar20", "stl10")


def _own_split(config: Config, key: str) -> str | None:
    source = config.data.source
    return f"data.source={source} has test images of its own" if source in _WITH_TEST_SPLIT else None


def _no_class_folders(config: Config, key: str) -> str | None:
    source = config.data.source
    return None if source in ("folder", "imagenet") else f"data.source={source} has no folders of classes"


def _no_files(config: Config, key: str) -> str | None:
    source = config.data.source
    return f"data.source={source} has arrays, no encoded images" if source in _ARRAYS else None


def _no_root(config: Config, key: str) -> str | None:
    return "data.source=digits is part of scikit-learn" if config.data.source == "digits" else None


def _no_pretext(config: Config, key: str) -> str | None:
    why = config.why_without("pretext")
    return why and why.replace("its place", "the place of pretext and mining")


def _no_pretext_training(config: Config, key: str) -> str | None:
    method = config.pretext.method
    return _no_pretext(config, key) or (None if method.trains else f"pretext.method={method.kind} trains nothing")


def _pretrained_replaced(config: Config, key: str) -> str | None:
    method = config.pretext.method.kind
    return "pretext.method=weights replaces the published weights" if method == "weights" else None


def _no_projector(config: Config, key: str) -> str | None:
    method = config.pretext.method.kind
    unused = method in ("none", "rotation")
    return _no_pretext(config, key) or (f"pretext.method={method} uses no projector" if unused else None)


def _any_image_size(config: Config, key: str) -> str | None:
    if config.model.network.startswith("timm:"):
        return None
    return f"model.backbone={config.model.backbone} is built for images of any size"


def _no_labels(config: Config, key: str) -> str | None:
    return "data.labels=none leaves nothing to compare with" if config.data.labels == "none" else None


def _no_baselines(config: Config, key: str) -> str | None:
    return _no_labels(config, key) or (None if config.evaluation.baselines else "evaluation.baselines=false")


def _no_small_views(config: Config, key: str) -> str | None:
    views = getattr(config.pretext.method, "small_views", 0)
    return None if views else "pretext.method.small_views=0 draws no small views"


def _given_heads(config: Config, key: str) -> str | None:
    return "clustering.weights takes the place of training heads" if config.clustering.weights is not None else None


def _no_heads_trained(config: Config, key: str) -> str | None:
    frozen = "clustering.update=features groups features and trains nothing on views"
    return _given_heads(config, key) or (None if config.clustering.trains else frozen)


def _no_such_objective(config: Config, key: str) -> str | None:
    kind, clustering = config.clustering.objective.kind, config.clustering
    unused = not clustering.trains and kind not in clustering.refinements
    no_head = f"clustering.update=features trains no head with the objective {kind} (clustering.refinements)"
    return _given_heads(config, key) or (no_head if unused else None)


def _no_neighbors_in_loss(config: Config, key: str) -> str | None:
    turtle = config.clustering.objective.kind == "turtle"
    return "clustering.objective=turtle takes no neighbours" if turtle else None


def _no_partners(config: Config, key: str) -> str | None:
    return "clustering.neighbors=0 pairs each image with itself" if config.clustering.neighbors == 0 else None


def _no_partition(config: Config, key: str) -> str | None:
    update = config.clustering.update
    return f"clustering.update={update} does not group frozen features" if update != "features" else None


def _no_momentum(config: Config, key: str) -> str | None:
    name = _training(config, key).optimizer.name
    return f"the optimizer {name} has no momentum of this kind" if name in ("adam", "adamw") else None


def _no_choice_of_nesterov(config: Config, key: str) -> str | None:
    name = _training(config, key).optimizer.name
    return None if name == "sgd" else f"it is for sgd, and the optimizer is {name}"


def _no_decay(config: Config, key: str) -> str | None:
    return None if _training(config, key).optimizer.weight_decay else "weight_decay=0 decays nothing"


def _no_cosine(config: Config, key: str) -> str | None:
    name = _training(config, key).schedule.name
    return None if name == "cosine" else f"it is for the schedule cosine, and the schedule is {name}"


def _no_steps(config: Config, key: str) -> str | None:
    schedule = _training(config, key).schedule
    if schedule.name != "step":
        return f"it is for the schedule step, and the schedule is {schedule.name}"
    return None if schedule.decay_epochs else "decay_epochs names no epoch"


def _no_change_of_rate(config: Config, key: str) -> str | None:
    schedule = _training(config, key).schedule
    constant = schedule.name == "constant" and not schedule.warmup_epochs
    return "the learning rate is constant" if constant else None


def _fixed_confidence(config: Config, key: str) -> str | None:
    fixed = config.selflabel is not None and config.selflabel.confidence == "fixed"
    return "selflabel.confidence=fixed goes by the threshold alone" if fixed else None


def _no_average(config: Config, key: str) -> str | None:
    none = config.selflabel is not None and config.selflabel.ema is None
    return "selflabel.ema=null keeps no average" if none else None


# -- the table ---------------------------------------------------------------------------------------------------------

RULES: tuple[Rule, ...] = (
    Rule(("data.root",), _no_root),
    Rule(("data.test_fraction",), _own_split),
    Rule(("data.classes_file",), _no_class_folders),
    Rule(("data.crop", "data.decode"), _no_files),
    Rule(("model.stem",), _no_pretext_training),
    Rule(("model.pretrained",), _pretrained_replaced),
    Rule(("model.image_size",), _any_image_size),
    Rule(("model.projector", "model.projection_dim", "model.hidden_dim"), _no_projector),
    Rule(("pretext.*", "mining.k", "mining.features"), _no_pretext),
    Rule(_of_training("epochs", "batch_size", "optimizer.*", "schedule.*", stages=("pretext",)), _no_pretext_training),
    Rule(("pretext.monitor_every",), _no_pretext_training),
    Rule(("pretext.monitor_every", "pretext.monitor_k", "pretext.monitor_temperature"), _no_labels),
    Rule(("pretext.method.small_view.*",), _no_small_views),
    Rule(
        (
            *_of_training("epochs", "batch_size", "optimizer.*", "schedule.*", stages=("clustering",)),
            *("clustering.stop_when_stable", "clustering.evaluate_every", "clustering.initialize"),
            *("clustering.neighbors", "clustering.include_self", "clustering.view.[!s]*", "clustering.view.s[!i]*"),
        ),
        _no_heads_trained,
    ),
    Rule(("clustering.heads",), _given_heads),
    Rule(("clustering.objective.*",), _no_such_objective),
    Rule(("clustering.neighbors", "clustering.include_self", "clustering.true_neighbors"), _no_neighbors_in_loss),
    Rule(("clustering.include_self",), _no_partners),
    Rule(("clustering.ways", "clustering.refinements"), _no_partition),
    Rule(_of_training("optimizer.momentum"), _no_momentum),
    Rule(_of_training("optimizer.nesterov"), _no_choice_of_nesterov),
    Rule(_of_training("optimizer.decay_all"), _no_decay),
    Rule(_of_training("schedule.floor"), _no_cosine),
    Rule(_of_training("schedule.decay_rate", "schedule.decay_epochs"), _no_steps),
    Rule(_of_training("schedule.every"), _no_change_of_rate),
    Rule(("selflabel.fraction",), _fixed_confidence),
    Rule(("selflabel.ema_mode",), _no_average),
    Rule(("evaluation.baseline_seeds",), _no_baselines),
)
"""The keys that do not always count, and when they do not."""

ALWAYS: tuple[str, ...] = (
    *("name", "preset", "seed", "precision", "selflabel"),
    *("data.source", "data.labels", "data.image_size", "data.interpolation", "data.mean", "data.std", "data.limit"),
    # Permissions: what they allow need not come up.
    *("data.download", "data.on_error"),
    # The machine's: a user may give them to every run.
    *("data.resident", "data.identity", "data.workers", "data.renderer", "data.shuffle", "runtime.*"),
    # Refused by the configuration itself beside what contradicts them.
    *("model.width", "model.weights", "model.cluster_head", "model.cluster_hidden_dim", "mining.files"),
    *("clustering.cached_views", "clustering.weights", "clustering.weights_head"),
    *("model.backbone", "model.unit_features", "model.sync_batch_norm"),
    *("pretext.method.kind", "pretext.method.view.*", "pretext.method.small_views", "pretext.method.resolutions"),
    *("pretext.method.batch_statistics", "pretext.method.temperature", "pretext.method.anchors"),
    *("pretext.method.queue_size", "pretext.method.momentum", "pretext.method.rise_steps"),
    *("pretext.method.predictor_dim", "pretext.method.weight", "pretext.method.directions", "pretext.method.file"),
    *("mining.test_k", "mining.backend"),
    *("clustering.n_clusters", "clustering.update", "clustering.view.size"),
    *_of_training("epochs", "batch_size", "optimizer.name", "optimizer.lr", stages=("selflabel",)),
    *("selflabel.optimizer.weight_decay", "selflabel.schedule.name", "selflabel.schedule.warmup_epochs"),
    *("selflabel.stop_when_stable", "selflabel.threshold", "selflabel.confidence", "selflabel.keep"),
    *("selflabel.balance", "selflabel.ema", "selflabel.weak_view.*", "selflabel.view.*", "selflabel.evaluate_every"),
    *("evaluation.batch_size", "evaluation.baselines", "evaluation.thumbnails", "evaluation.map"),
)
"""Patterns of the keys that count in every run that has their stage, as far as a configuration tells."""


def check_effects(config: Config, given: Iterable[tuple[str, Any]]) -> None:
    """Refuse settings that a user has given and that have no effect, unless they have their default.

    A setting counts as withdrawn if its section is given as a whole afterwards (``selflabel=null``).

    Args:
        config: the configuration with these settings.
        given: dotted keys with their values, in the order in which they were given.

    Raises:
        ConfigError: names the key and why it has no effect.
    """
    words = list(given)
    for place, (key, value) in enumerate(words):
        if any(key.startswith(f"{later}.") for later, _ in words[place + 1 :]):
            continue
        for leaf, _ in flatten(value, key):
            why = why_without_effect(config, leaf)
            if why is not None:
                raise ConfigError(
                    f"{leaf}={_text(_at(config, leaf)[0])} has no effect: {why}; leave out one of the two"
                )


def why_without_effect(config: Config, key: str) -> str | None:
    """Return in words why the value of a key has no effect; None if it has one, or is the default."""
    value, default = _at(config, key)
    if value == default:
        return None
    name = f"{key}.kind" if isinstance(value, Settings) and "kind" in type(value).model_fields else key
    reasons = (
        rule.why_not(config, name) for rule in RULES if any(fnmatch.fnmatchcase(name, pattern) for pattern in rule.keys)
    )
    return next((reason for reason in reasons if reason is not None), None)


def _at(config: Config, key: str) -> tuple[Any, Any]:
    """Return the value of a key and its default; None and None if the configuration has no such section."""
    value: Any = config
    default: Any = None
    for part in key.split("."):
        if not isinstance(value, Settings) or part not in type(value).model_fields:
            return None, None
        default = type(value).model_fields[part].default
        value = getattr(value, part)
    return value, default


def _text(value: Any) -> str:
    return str(value.kind if isinstance(value, Settings) and hasattr(value, "kind") else value)
