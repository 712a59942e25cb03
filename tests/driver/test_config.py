"""Configurations: what a file, a preset and the command line make of one another, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from scan_fast.data.datasets import STATISTICS
from scan_fast.errors import ConfigError
from scan_fast.methods import SimCLRSettings
from scan_fast.models.backbones import multiply_adds
from scan_fast.runs.config import (
    Config,
    ScheduleConfig,
    build_config,
    differences,
    find_config,
    flatten,
    load_config,
    parse_override,
    presets_of,
)
from scan_fast.training.loop import learning_rate_factor
from scan_fast.views.parameters import STRONG_OPERATIONS

SHIPPED = (
    "cifar10", "cifar20", "digits", "folder", "imagenet", "imagenet50", "imagenet100", "imagenet200", "stl10",
    "tinyimagenet32",
)  # fmt: skip
PROCESSOR = ("cifar10", "cifar20", "stl10", "tinyimagenet32")


def shipped(name: str, *overrides: str) -> Config:
    return load_config(find_config(name), overrides)


def papers(name: str) -> str:
    """The preset with the recipe of the original; the paper has no digits."""
    return "reference" if name == "digits" else "paper"


def value(config: Config, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return found


# -- the original's hyperparameters ------------------------------------------------------------------------------------

SIMCLR = {
    "model.projector": "mlp",
    "model.projection_dim": 128,
    "pretext.method.kind": "simclr",
    "pretext.monitor_temperature": 0.1,
    "pretext.epochs": 500,
    "pretext.batch_size": 512,
    "pretext.method.temperature": 0.1,
    "pretext.method.anchors": "first",
    "pretext.monitor_k": 100,
    "pretext.optimizer.name": "sgd",
    "pretext.optimizer.lr": 0.4,
    "pretext.optimizer.momentum": 0.9,
    "pretext.optimizer.nesterov": False,
    "pretext.optimizer.weight_decay": 1e-4,
    "pretext.optimizer.decay_all": True,
    "pretext.schedule.name": "cosine",
    "pretext.schedule.floor": 1e-3,
    "pretext.schedule.warmup_epochs": 0,
    "pretext.schedule.every": "epoch",
    "mining.k": 20,
    "mining.test_k": 5,
    "mining.features": "projection",
}
MOCO = {
    "model.backbone": "resnet50",
    "model.projector": "mlp",
    "model.projection_dim": 128,
    "pretext.method.kind": "weights",
    "pretext.monitor_temperature": 0.07,
    "mining.k": 50,
    "mining.test_k": 5,
    "mining.features": "backbone",
    "data.image_size": 256,
    "data.crop": "whole",
    "data.interpolation": "auto",
    "evaluation.batch_size": 256,
}
SIMCLR_VIEW = {
    "kind": "simclr", "scale": (0.2, 1.0), "ratio": (3 / 4, 4 / 3), "flip": 0.5, "brightness": 0.4, "contrast": 0.4,
    "saturation": 0.4, "hue": 0.1, "jitter": 0.8, "grayscale": 0.2,
}  # fmt: skip
ADAM = {"name": "adam", "lr": 1e-4, "weight_decay": 1e-4, "decay_all": True}
SMALL_SCAN = {
    "clustering.objective.kind": "scan",
    "clustering.objective.entropy_weight": 5.0,
    "clustering.heads": 1,
    "clustering.update": "full",
    "clustering.neighbors": None,
    "clustering.include_self": True,
    "clustering.initialize": "random",
    "clustering.stop_when_stable": None,
    "clustering.schedule.name": "constant",
    "clustering.schedule.warmup_epochs": 0,
    **{f"clustering.optimizer.{key}": v for key, v in ADAM.items()},
}
LARGE_SCAN = {
    "clustering.epochs": 100,
    "clustering.objective.kind": "scan",
    "clustering.objective.entropy_weight": 5.0,
    "clustering.heads": 10,
    "clustering.update": "heads",
    "clustering.neighbors": None,
    "clustering.include_self": True,
    "clustering.initialize": "random",
    "clustering.stop_when_stable": None,
    "clustering.schedule.name": "constant",
    "clustering.optimizer.name": "sgd",
    "clustering.optimizer.lr": 5.0,
    "clustering.optimizer.momentum": 0.9,
    "clustering.optimizer.nesterov": False,
    "clustering.optimizer.weight_decay": 0.0,
}
SMALL_SELFLABEL = {
    "selflabel.batch_size": 1000,
    "selflabel.threshold": 0.99,
    "selflabel.balance": True,
    "selflabel.confidence": "fixed",
    "selflabel.keep": "last",
    "selflabel.stop_when_stable": None,
    "selflabel.ema": None,
    "selflabel.schedule.name": "constant",
    **{f"selflabel.optimizer.{key}": v for key, v in ADAM.items()},
}
LARGE_SELFLABEL = {
    "selflabel.epochs": 25,
    "selflabel.batch_size": 512,
    "selflabel.threshold": 0.99,
    "selflabel.balance": False,
    "selflabel.ema": 0.999,
    "selflabel.ema_mode": "write_back",
    "selflabel.confidence": "fixed",
    "selflabel.keep": "last",
    "selflabel.stop_when_stable": None,
    "selflabel.schedule.name": "constant",
    "selflabel.optimizer.name": "sgd",
    "selflabel.optimizer.lr": 0.03,
    "selflabel.optimizer.momentum": 0.9,
    "selflabel.optimizer.nesterov": False,
    "selflabel.optimizer.weight_decay": 0.0,
}


def views(clustering: str, size: int | None, cutout: int, pretext: bool) -> dict[str, Any]:
    """The rows on augmentation: the view of each stage, by its keys. The size None is that of the data set's images."""
    strong = {"kind": "strong", "size": size, "operations": 4, "cutout": cutout, "flip": 0.5}
    simclr = {**SIMCLR_VIEW, "size": size}
    found = {f"clustering.view.{key}": v for key, v in (strong if clustering == "strong" else simclr).items()}
    if pretext:
        found |= {f"pretext.method.view.{key}": v for key, v in simclr.items()}
    found |= {f"selflabel.view.{key}": v for key, v in strong.items()}
    return found | {"selflabel.weak_view.kind": "plain", "selflabel.weak_view.size": size}


ORIGINAL: dict[str, dict[str, Any]] = {
    "cifar10": {
        **SIMCLR, **SMALL_SCAN, **SMALL_SELFLABEL, **views("strong", None, 16, True),
        "model.backbone": "resnet18_cifar",
        "clustering.n_clusters": 10, "clustering.epochs": 50, "clustering.batch_size": 128, "selflabel.epochs": 200,
    },
    "cifar20": {
        **SIMCLR, **SMALL_SCAN, **SMALL_SELFLABEL, **views("strong", None, 16, True),
        "model.backbone": "resnet18_cifar",
        "clustering.n_clusters": 20, "clustering.epochs": 100, "clustering.batch_size": 512, "selflabel.epochs": 200,
    },
    "stl10": {
        **SIMCLR, **SMALL_SCAN, **SMALL_SELFLABEL, **views("strong", None, 32, True), "model.backbone": "resnet18_stl",
        "clustering.n_clusters": 10, "clustering.epochs": 100, "clustering.batch_size": 128, "selflabel.epochs": 100,
    },
    # The CIFAR-10 recipe with the 100 epochs of stage two that the paper states for all small sets, and the original's
    # batches for 200 classes.
    "tinyimagenet32": {
        **SIMCLR, **SMALL_SCAN, **SMALL_SELFLABEL, **views("strong", None, 16, True),
        "model.backbone": "resnet18_cifar", "data.source": "tinyimagenet", "data.image_size": 32,
        "clustering.n_clusters": 200, "clustering.epochs": 100, "clustering.batch_size": 1024, "selflabel.epochs": 200,
    },
    # The same recipe again.
    "folder": {
        **SIMCLR, **SMALL_SCAN, **SMALL_SELFLABEL, **views("strong", None, 16, True),
        "clustering.epochs": 100, "clustering.batch_size": 128, "selflabel.epochs": 200,
    },
    **{
        f"imagenet{classes}": {
            **MOCO, **LARGE_SCAN, **LARGE_SELFLABEL, **views("simclr", 224, 75, False),
            "clustering.n_clusters": classes, "clustering.batch_size": batch,
        }
        for classes, batch in ((50, 512), (100, 1024), (200, 1024))
    },
    "imagenet": {
        **MOCO, **LARGE_SCAN, "clustering.n_clusters": 1000, "selflabel": None,
        "clustering.view.kind": "simclr", "clustering.view.size": 224,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ORIGINAL)
def test_paper_preset_holds_the_originals_values(name: str) -> None:
    config = shipped(name, "preset=paper")
    assert config.precision == "float32"
    wrong = {k: (value(config, k), v) for k, v in ORIGINAL[name].items() if value(config, k) != v}
    assert not wrong


def test_the_reference_preset_of_the_digits_differs_from_the_original_in_what_digits_need() -> None:
    config = shipped("digits", "preset=reference")
    own = {"model.projection_dim", "pretext.monitor_k", "pretext.batch_size", "pretext.optimizer.lr"}
    own |= {"selflabel.batch_size"}
    expected = {**SIMCLR, **SMALL_SCAN, **SMALL_SELFLABEL, "clustering.epochs": 100, "selflabel.epochs": 200}
    assert {key for key, wanted in expected.items() if value(config, key) != wanted} == own
    # As many images per unit of the learning rate.
    pretext = config.pretext
    assert pretext.optimizer.lr / pretext.batch_size == pytest.approx(0.4 / 512)


def test_a_preset_that_is_not_there_may_say_which_to_take(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"'paper' is not in digits\.yaml; the paper has no digits; preset=reference is"
    ):
        shipped("digits", "preset=paper")
    file = tmp_path / "mine.yaml"
    file.write_text("preset: old\npresets: {old: take new, new: {seed: 3}}\n")
    with pytest.raises(ConfigError, match=r"^preset 'old' is not in mine\.yaml; take new$"):
        load_config(file)
    with pytest.raises(ConfigError, match=r"^preset 'odd' is not in mine\.yaml; it has new$"):
        load_config(file, ["preset=odd"])
    assert load_config(file, ["preset=new"]).seed == 3


def test_fast_presets_train_heads_for_thousands_of_steps() -> None:
    """Fewer steps leave random heads of the digits far from k-means heads (docs/recipes.md)."""
    images = {
        "cifar10": 50_000, "cifar20": 50_000, "stl10": 5_000, "imagenet50": 64_274, "imagenet100": 128_545,
        "imagenet200": 256_558, "imagenet": 1_281_167, "tinyimagenet32": 100_000,
    }  # fmt: skip
    for name, n in images.items():
        config = shipped(name, "preset=fast")
        for section in (config.clustering, config.selflabel):
            if section is not None:
                assert section.epochs * (n // section.batch_size) >= 1800, (name, section.epochs, section.batch_size)


def test_normalisation_is_the_originals() -> None:
    assert STATISTICS["cifar10"] == ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
    assert STATISTICS["cifar20"] == ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))
    assert STATISTICS["imagenet"] == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    # STL-10 has the statistics of ImageNet, which is what a source without its own gets.
    assert "stl10" not in STATISTICS
    assert all(shipped(name).data.mean is None and shipped(name).data.std is None for name in SHIPPED)


def test_strong_operations_are_the_originals() -> None:
    assert {name: (low, high) for name, low, high in STRONG_OPERATIONS} == {
        "identity": (0.0, 1.0), "autocontrast": (0.0, 1.0), "equalize": (0.0, 1.0), "rotate": (-30.0, 30.0),
        "solarize": (0.0, 256.0), "color": (0.05, 0.95), "contrast": (0.05, 0.95), "brightness": (0.05, 0.95),
        "sharpness": (0.05, 0.95), "shear_x": (-0.1, 0.1), "translate_x": (-0.1, 0.1), "translate_y": (-0.1, 0.1),
        "posterize": (4.0, 8.0), "shear_y": (-0.1, 0.1),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["cifar10", "cifar20", "stl10"])
def test_paper_cosine_is_the_originals(name: str) -> None:
    config = shipped(name, "preset=paper").pretext
    lr, epochs = config.optimizer.lr, config.epochs
    floor = lr * 0.1**3
    for epoch in (0, 1, 100, 250, 499):
        expected = floor + (lr - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2
        assert lr * learning_rate_factor(config.schedule, epoch, epochs) == pytest.approx(expected, rel=1e-12)


def test_step_schedule_falls_after_its_epochs() -> None:
    schedule = ScheduleConfig(name="step", decay_rate=0.1, decay_epochs=(3, 5))
    factors = [learning_rate_factor(schedule, epoch, 8) for epoch in range(8)]
    assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_warm_up_is_linear_and_then_cosine() -> None:
    schedule = ScheduleConfig(name="cosine", warmup_epochs=3, floor=0.01)
    factors = [learning_rate_factor(schedule, epoch, 18) for epoch in range(18)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    expected = [0.01 + 0.99 * (1 + math.cos(math.pi * i / 15)) / 2 for i in range(15)]
    assert factors[3:] == pytest.approx(expected)


def test_warm_up_is_at_most_a_fifth_of_the_epochs() -> None:
    long, short = ScheduleConfig(name="cosine", warmup_epochs=10), ScheduleConfig(name="cosine", warmup_epochs=4)
    positions = [step / 7 for step in range(7 * 20)]
    cut, fitting = ([learning_rate_factor(schedule, at, 20) for at in positions] for schedule in (long, short))
    assert cut == fitting
    assert positions[cut.index(max(cut))] == 4
    assert learning_rate_factor(long, 0, 1) < 1
    # No preset's warm-up is longer, so that presets keep their bits.
    for name in SHIPPED:
        for preset in (papers(name), "fast", *(["cpu"] if name in PROCESSOR else [])):
            config = shipped(name, f"preset={preset}")
            for section in (config.pretext, config.clustering, config.selflabel):
                assert section is None or 5 * section.schedule.warmup_epochs <= section.epochs, name


def test_constant_schedule_is_constant() -> None:
    assert {learning_rate_factor(ScheduleConfig(), p / 7, 10) for p in range(70)} == {1.0}


# -- files, presets, overrides -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_load_in_both_presets_and_round_trip(name: str) -> None:
    paper, fast = shipped(name, f"preset={papers(name)}"), shipped(name, "preset=fast")
    assert shipped(name) == fast
    assert differences(paper, fast)
    for config in (paper, fast):
        assert build_config(yaml.safe_load(config.to_yaml())) == config


@pytest.mark.parametrize("name", SHIPPED)
def test_data_sets_of_small_images_have_a_preset_for_processors(name: str) -> None:
    assert ("cpu" in presets_of(find_config(name))) == (name in PROCESSOR)
    if name not in PROCESSOR:
        with pytest.raises(ConfigError, match=rf"^preset 'cpu' is not in {name}\.yaml; it has "):
            shipped(name, "preset=cpu")
        return
    fast, cpu = shipped(name, "preset=fast"), shipped(name, "preset=cpu")
    assert build_config(yaml.safe_load(cpu.to_yaml())) == cpu and cpu.preset == "cpu"
    # Less work in every stage, on the same images and the same number of groups.
    assert fast.selflabel is not None and cpu.selflabel is not None
    for less, more in ((cpu.pretext, fast.pretext), (cpu.clustering, fast.clustering), (cpu.selflabel, fast.selflabel)):
        assert less.epochs < more.epochs
    side = 96 if name == "stl10" else 32
    assert multiply_adds(cpu.model, side) < multiply_adds(fast.model, side) / 2
    assert (
        cpu.data.source == fast.data.source
        and cpu.data.limit is None
        and cpu.clustering.n_clusters == fast.clustering.n_clusters
    )


def test_a_preset_may_set_the_network_the_images_and_the_precision(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "base: cifar10.yaml\nname: mine\npresets:\n  cpu:\n    precision: float32\n    data: {image_size: 24}\n"
        "    model: {width: 0.5}\n    pretext: {method: {temperature: 0.3}}\n    selflabel: null\n"
    )
    (tmp_path / "cifar10.yaml").write_text(find_config("cifar10").read_text())
    config, shipped_one = load_config(file, ["preset=cpu"]), shipped("cifar10", "preset=cpu")
    assert (config.precision, config.data.image_size, config.model.width) == ("float32", 24, 0.5)
    assert config.selflabel is None and config.model.backbone == shipped_one.model.backbone
    assert config.pretext.method.model_dump()["temperature"] == 0.3
    assert load_config(file).data.image_size is None
    assert load_config(file, ["preset=cpu", "model.width=0.25"]).model.width == 0.25


def test_a_shipped_configuration_is_found_by_name_and_by_its_usual_path(tmp_path: Path) -> None:
    assert find_config("digits") == find_config("configs/digits.yaml") == find_config("digits.yaml")
    with pytest.raises(ConfigError, match=r"there is no configuration 'elsewhere/digits\.yaml'"):
        find_config("elsewhere/digits.yaml")
    (tmp_path / "digits.yaml").write_text("name: mine\n")
    assert load_config(find_config(str(tmp_path / "digits.yaml"))).name == "mine"


def test_overrides_win_over_changes_over_presets() -> None:
    config = load_config(find_config("digits"), ["pretext.epochs=3"], {"pretext.epochs": 2, "mining.k": 7})
    assert (config.pretext.epochs, config.mining.k) == (3, 7)
    method = load_config(find_config("digits"), ["preset=reference"]).pretext.method
    assert isinstance(method, SimCLRSettings) and method.anchors == "first"


def test_overrides_are_yaml() -> None:
    assert parse_override("a.b=null") == ("a.b", None)
    assert parse_override("a=[1, 2]") == ("a", [1, 2])
    assert parse_override("a=") == ("a", None)
    assert parse_override("a=b=c") == ("a", "b=c")
    config = shipped("digits", "selflabel=null", "pretext.optimizer.lr=1e-3", "data.mean=[0, 0.5, 1]")
    assert config.selflabel is None
    assert config.pretext.optimizer.lr == 1e-3
    assert config.data.mean == (0.0, 0.5, 1.0)


def test_another_kind_of_view_replaces_the_view() -> None:
    view = shipped("cifar10", "clustering.view.kind=plain").clustering.view
    assert view.kind == "plain"
    assert view.size is None


def test_differences_name_the_key_and_leave_the_runtime_out() -> None:
    old, new = shipped("digits"), shipped("digits", "mining.k=9", "runtime.threads=2", "selflabel=null")
    found = differences(old, new)
    assert "mining.k: 20 -> 9" in found
    assert any(line.startswith("selflabel.epochs: ") and line.endswith("-> unset") for line in found)
    assert not any(line.startswith("runtime") for line in found)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretext.epoch=3", "unknown key pretext.epoch: did you mean pretext.epochs?"),
        ("pretxt.epochs=3", "unknown key pretxt: did you mean pretext?"),
        ("clustering.optimizer.learning_rate=1", "clustering.optimizer.learning_rate"),
        (
            "pretext.method.view.scales=[0.2, 1]",
            "unknown key pretext.method.view.scales: did you mean pretext.method.view.scale?",
        ),
        ("zzz=1", "unknown key zzz: the top level has clustering, data,"),
        ("pretext.epochs=many", "pretext.epochs: input should be a valid integer"),
        ("pretext.epochs=2.5", "pretext.epochs: input should be a valid integer"),
        ("pretext.epochs=yes", "pretext: epochs must not be true or false"),
        ("pretext.epochs=0", "pretext.epochs: input should be greater than or equal to 1, got 0"),
        (
            "pretext.method.resolutions=[[0.5, 4], [0.4, 6]]",
            "resolutions must have shares that rise between 0 and 1, got [0.5",
        ),
        ("pretext.method.resolutions=[[1.0, 4]]", "resolutions must have shares that rise between 0 and 1, got [1.0]"),
        ("pretext.method.resolutions=[[0.5, 0]]", "resolutions must have sizes of at least one pixel"),
        ("pretext.method.temperature=.inf", "pretext.method.temperature: input should be a finite number"),
        ("pretext.optimizer.lr=.nan", "pretext.optimizer.lr: input should be"),
        ("pretext.optimizer.name=lamb", "'sgd', 'adam', 'adamw' or 'muon', got 'lamb'"),
        ("clustering.n_clusters=1", "clustering.n_clusters: one group needs no clustering; give at least 2, got 1"),
        (
            "clustering.n_clusters=many",
            "clustering.n_clusters: must be a whole number of at least 2, or auto, got 'many'",
        ),
        ("clustering=5", "clustering: input should be a valid dictionary"),
        ("data.mean=[1, 2]", "data.mean"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        ("clustering.view.kind=weak", "clustering.view"),
        ("model.backbone=resnet17", "got 'resnet17'; did you mean 'resnet"),
        ("preset=quick", "preset 'quick' is not in digits.yaml; it has reference, fast"),
        ("preset=[1]", "preset [1] is not in digits.yaml"),
        ("pretext.epochs=[", "the value of pretext.epochs is not valid YAML"),
    ],
)
def test_refused_values_name_their_key(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        shipped("digits", override)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


def test_a_section_without_its_kind_is_named(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("data: {source: digits}\npretext: {method: {temperature: 0.2}}")
    with pytest.raises(ConfigError) as info:
        load_config(path)
    kinds = "simclr, moco, byol, sigreg, visreg, rotation, weights, none"
    assert str(info.value) == f"pretext.method.kind is missing: give one of {kinds} beside {{'temperature': 0.2}}"


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as refusal:
        shipped("digits", "pretext.epochs=0", "mining.k=x", "clustering.hedas=2")
    assert all(key in str(refusal.value) for key in ("pretext.epochs", "mining.k", "did you mean clustering.heads?"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"- 1\n- 2\n", "must hold sections (data, pretext, ...), it holds list"),
        (b"", "it holds NoneType"),
        (b"\xff\xfe\x00", "is not valid YAML"),
        (b"1: 2\n", "1: keys should be strings"),
        (b"presets: [1, 2]\n", "presets must hold sections"),
        (b"presets: {fast: 3}\n", "presets must hold sections"),
        (b"presets: {1: {seed: 3}}\n", "preset None is not in file.yaml; it has 1"),
        (b"pretext:\n", "pretext: input should be a valid dictionary"),
    ],
)
def test_refused_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as refusal:
        load_config(file)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_preset_of_a_file_without_presets_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text("name: plain\n")
    with pytest.raises(ConfigError, match="has no presets, so preset=fast cannot be chosen"):
        load_config(tmp_path / "plain.yaml", ["preset=fast"])


# -- sections chosen by kind, and inherited files ----------------------------------------------------------------------


def test_a_bare_kind_stands_for_its_section() -> None:
    config = load_config(find_config("digits"), ["pretext.method=weights", "pretext.method.file=some.pth"])
    assert config.pretext.method.model_dump() == {"kind": "weights", "file": Path("some.pth").absolute()}
    # The kind that is there already keeps its settings.
    config = load_config(find_config("digits"), ["pretext.method=simclr", "pretext.method.anchors=first"])
    assert config.pretext.method.model_dump()["temperature"] == 0.15
    config = load_config(find_config("digits"), ["selflabel.view=plain"])
    assert config.selflabel is not None and config.selflabel.view.kind == "plain"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("pretext.method=moca", "pretext.method: input tag 'moca' found using 'kind' does not match"),
        ("pretext.method=weights", "pretext.method.file is missing"),
        ("pretext.method={kind: weights, file: a, temperature: 1}", "unknown key pretext.method.temperature"),
        ("clustering.objective=scam", "clustering.objective: input tag 'scam' found using 'kind' does not match"),
        ("pretext.method=none", "pretext.method=none takes the backbone as it is, so it needs model.pretrained=true"),
    ],
)
def test_wrong_kinds_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load_config(find_config("digits"), [word])
    assert message in str(refusal.value)


def test_no_training_needs_the_backbones_space() -> None:
    words = ["pretext.method=none", "model={backbone: 'torchvision:resnet18', pretrained: true, width: 1}"]
    with pytest.raises(ConfigError, match=r"needs mining\.features=backbone"):
        load_config(find_config("digits"), words)
    assert load_config(find_config("digits"), [*words, "mining.features=backbone"]).pretext.method.kind == "none"


def test_a_file_inherits_values_and_presets(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "name: one\npreset: b\nmining: {k: 3, test_k: 2}\npresets: {a: {seed: 1}, b: {}}\n"
    )
    (tmp_path / "two.yaml").write_text("base: one.yaml\nname: two\nmining: {k: 4}\npresets: {b: {seed: 2}}")
    (tmp_path / "three.yaml").write_text("base: two.yaml\nmining: {test_k: 5}")
    config = load_config(tmp_path / "three.yaml")
    assert (config.name, config.mining.k, config.mining.test_k, config.preset, config.seed) == ("two", 4, 5, "b", 2)
    assert load_config(tmp_path / "three.yaml", ["preset=a"]).seed == 1
    (tmp_path / "one.yaml").write_text("base: three.yaml")
    with pytest.raises(ConfigError, match=r"is its own base: three\.yaml -> two\.yaml -> one\.yaml -> three\.yaml"):
        load_config(tmp_path / "three.yaml")
    (tmp_path / "one.yaml").write_text("base: four.yaml")
    with pytest.raises(ConfigError, match=r"base must name a YAML file in or relative to .*, got 'four\.yaml'"):
        load_config(tmp_path / "three.yaml")


def test_a_part_of_a_view_that_only_the_defaults_have_can_be_set() -> None:
    before, after = (
        dict(flatten(shipped("digits", *words).model_dump()))
        for words in ((), ("pretext.method.small_view.size=8", "pretext.method.small_views=2", "seed=3"))
    )
    changes = {"pretext.method.small_view.size": 8, "pretext.method.small_views": 2, "seed": 3}
    assert after == {**before, **changes}
    with pytest.raises(ConfigError, match=r"small_view\..*sise"):
        shipped("digits", "pretext.method.small_view.sise=8")
