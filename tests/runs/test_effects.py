"""Settings that have no effect beside others are refused if a user gives them, and every key is known to the table."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import pytest

from scan_fast.errors import ConfigError
from scan_fast.estimator import ImageClusterer
from scan_fast.runs.config import Config, build_config, find_config, flatten, load_config, parse_override
from scan_fast.runs.effects import ALWAYS, RULES, check_effects, why_without_effect
from scan_fast.runs.keys import all_keys

NAMES = sorted({key.name for key in all_keys()})

FEATURES = "clustering.update=features mining.features=backbone"
WEIGHTS = "clustering.weights=scan.pth clustering.n_clusters=10"
FROZEN = "pretext.method=none model.backbone=descriptor mining.features=backbone"

EXAMPLES = (
    ("digits", "data.root=/images", "data.source=digits is part of scikit-learn"),
    ("digits", "data.test_fraction=0.1", "data.source=digits has test images of its own"),
    ("cifar10", "data.classes_file=x.txt", "has no folders of classes"),
    ("cifar10", "data.crop=file", "has arrays, no encoded images"),
    ("digits", "data.decode=scaled", "has arrays, no encoded images"),
    ("folder", f"{WEIGHTS} model.stem=whitened", "clustering.weights=.* takes the place of pretext and mining"),
    ("folder", "pretext.method={kind: weights, file: x.pth} model.backbone=dinov2-small model.pretrained=true", "repl"),
    ("folder", "model.image_size=64", "model.backbone=auto is built for images of any size"),
    ("folder", f"{FROZEN} model.projection_dim=64", "pretext.method=none uses no projector"),
    ("folder", "pretext.method=rotation mining.features=backbone model.hidden_dim=64", "rotation uses no projector"),
    ("folder", f"{FROZEN} pretext.epochs=7", "pretext.method=none trains nothing"),
    ("folder", f"{FROZEN} pretext.optimizer.lr=0.5", "pretext.method=none trains nothing"),
    ("folder", f"{FROZEN} pretext.monitor_every=2", "pretext.method=none trains nothing"),
    ("folder", f"{WEIGHTS} mining.k=7", "takes the place of pretext and mining"),
    ("folder", f"{WEIGHTS} pretext.method=moco", "takes the place of pretext and mining"),
    ("folder", "data.labels=none pretext.monitor_k=7", "data.labels=none leaves nothing to compare with"),
    ("folder", "pretext.method.small_view.flip=0.1", "small_views=0 draws no small views"),
    ("folder", f"{FEATURES} clustering.epochs=7", "clustering.update=features groups features"),
    ("folder", f"{FEATURES} clustering.view.cutout=3", "clustering.update=features groups features"),
    ("folder", f"{FEATURES} clustering.view=plain", "clustering.view=plain has no effect"),
    ("folder", f"{FEATURES} clustering.neighbors=3", "clustering.update=features groups features"),
    ("folder", f"{WEIGHTS} clustering.heads=3", "clustering.weights takes the place of training heads"),
    ("folder", f"{WEIGHTS} clustering.objective.entropy_weight=3", "takes the place of training heads"),
    ("folder", f"{FEATURES} clustering.objective=turtle", "no head with the objective turtle"),
    ("folder", "clustering.objective=turtle clustering.neighbors=3", "clustering.objective=turtle takes no neighbours"),
    ("folder", "clustering.neighbors=0 clustering.include_self=false", "pairs each image with itself"),
    ("folder", "clustering.ways=[ward]", "clustering.update=full does not group frozen features"),
    ("folder", "clustering.optimizer.momentum=0.5", "the optimizer adam has no momentum of this kind"),
    ("folder", "selflabel.optimizer.nesterov=true", "it is for sgd, and the optimizer is adam"),
    (
        "folder",
        "clustering.optimizer.decay_all=false clustering.optimizer.weight_decay=0",
        "weight_decay=0 decays noth",
    ),
    ("folder", "clustering.schedule.floor=0.5", "it is for the schedule cosine, and the schedule is constant"),
    ("folder", "clustering.schedule.decay_epochs=[3]", "it is for the schedule step, and the schedule is constant"),
    ("folder", "clustering.schedule.name=step clustering.schedule.decay_rate=0.5", "decay_epochs names no epoch"),
    ("folder", "selflabel.schedule.every=step", "the learning rate is constant"),
    ("folder", "selflabel.fraction=0.1", "selflabel.confidence=fixed goes by the threshold alone"),
    ("folder", "selflabel.ema=null selflabel.ema_mode=write_back", "selflabel.ema=null keeps no average"),
    ("folder", "evaluation.baselines=false evaluation.baseline_seeds=5", "evaluation.baselines=false"),
)


def configured(name: str, words: str) -> tuple[Config, list[str]]:
    """Split words at blanks that no brackets enclose."""
    parts: list[str] = []
    for part in words.split(" "):
        if parts and parts[-1].count("{") > parts[-1].count("}"):
            parts[-1] += f" {part}"
        else:
            parts.append(part)
    return load_config(find_config(name), parts), parts


@pytest.mark.parametrize(("name", "words", "reason"), EXAMPLES, ids=[words for _, words, _ in EXAMPLES])
def test_a_setting_without_effect_is_refused(name: str, words: str, reason: str) -> None:
    config, parts = configured(name, words)
    with pytest.raises(ConfigError, match=f"has no effect: .*{reason}|{reason}.*: .*; leave out one of the two"):
        check_effects(config, map(parse_override, parts))
    # The other words alone are good.
    for part in parts:
        key = part.partition("=")[0]
        if why_without_effect(config, key) is None:
            check_effects(config, [parse_override(part)])


def test_every_rule_has_an_example() -> None:
    seen = set()
    for name, words, _ in EXAMPLES:
        config, parts = configured(name, words)
        for part in parts:
            for number, rule in enumerate(RULES):
                key = part.partition("=")[0]
                given = {key, f"{key}.kind"}
                if any(fnmatch.filter(given, pattern) for pattern in rule.keys) and rule.why_not(config, key):
                    seen.add(number)
    assert [rule.keys for number, rule in enumerate(RULES) if number not in seen] == []


def test_every_key_is_in_the_table_or_always_counts() -> None:
    # A whole stage that is left out says nothing about a new key of it.
    patterns = [pattern for rule in RULES for pattern in rule.keys if pattern != "pretext.*"]
    for name in NAMES:
        ruled = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        always = any(fnmatch.fnmatchcase(name, pattern) for pattern in ALWAYS)
        assert ruled != always, f"say in runs/effects.py when {name} counts"
    for pattern in (*patterns, *ALWAYS):
        assert fnmatch.filter(NAMES, pattern), f"{pattern} is of no key"


def test_files_may_hold_what_a_preset_does_not_need() -> None:
    for name, preset in (("folder", "pretrained"), ("folder", "descriptor"), ("digits", "reference")):
        config, parts = configured(name, f"preset={preset}")
        check_effects(config, map(parse_override, parts))
        # A run folder has every value of its configuration.
        assert build_config(dict(config.model_dump(mode="json"))) == config


def test_defaults_and_sections_that_are_given_later_are_no_mistake() -> None:
    for words in (
        f"{FROZEN} pretext.epochs=100",
        "selflabel.epochs=3 selflabel=null",
        f"{FEATURES} clustering.heads=4",
    ):
        config, parts = configured("folder", words)
        check_effects(config, map(parse_override, parts))


def test_nested_values_are_looked_into() -> None:
    values = {"clustering.schedule": {"name": "constant", "floor": 0.5}}
    config = load_config(find_config("folder"), (), values)
    with pytest.raises(ConfigError, match=r"clustering\.schedule\.floor=0\.5 has no effect"):
        check_effects(config, values.items())
    assert dict(flatten(values["clustering.schedule"], "x")) == {"x.name": "constant", "x.floor": 0.5}


def test_the_estimator_refuses_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"selflabel\.fraction=0\.2 has no effect"):
        ImageClusterer(3, settings={"selflabel.fraction": 0.2}, out=tmp_path).fit([])


def test_groups_of_features_have_linear_heads() -> None:
    words = [*FEATURES.split(), "model.cluster_head=mlp"]
    with pytest.raises(ConfigError, match=r"set model\.cluster_head=linear, not mlp"):
        load_config(find_config("folder"), words)
