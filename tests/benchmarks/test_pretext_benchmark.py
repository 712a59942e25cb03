"""The comparison of stage one with lightly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks import baseline, pretext
from benchmarks.stage_pairs import write_images
from scan_fast.data.datasets import open_splits
from scan_fast.errors import ConfigError
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import PretextModel
from scan_fast.runs.config import Config, find_config, load_config

SMALL = (
    "data.source=folder",
    "data.limit=null",
    "data.test_fraction=0.25",
    "model.width=0.125",
    "pretext.batch_size=16",
    "pretext.epochs=2",
    "mining.k=5",
)


def recipe(folder: Path, *words: str) -> Config:
    return load_config(find_config("cifar10"), [*pretext.RECIPE, *SMALL, f"data.root={folder}", *words])


@pytest.mark.parametrize("backbone", ["resnet10_pooled", "resnet18_pooled"])
def test_plain_network_computes_what_ours_does(backbone: str) -> None:
    torch.manual_seed(0)
    config = ModelConfig(backbone=backbone, width=0.125, projector="mlp", projection_dim=16)
    ours, plain = PretextModel(config).eval(), baseline.ContrastiveModel(config).eval()
    plain.load_state_dict(ours.state_dict())
    images = torch.randn(3, 3, 32, 32)
    expected = torch.nn.functional.normalize(ours(images), dim=1)
    torch.testing.assert_close(plain(images), expected, rtol=1e-4, atol=1e-5)


def test_both_sides_train_from_the_same_weights(tmp_path: Path) -> None:
    pytest.importorskip("lightly")
    threads = torch.get_num_threads()
    config = recipe(write_images(tmp_path, 64), "runtime.device=cpu")
    found = pretext.measure_seed(config, open_splits(config.data))
    torch.set_num_threads(threads)
    assert list(found) == ["untrained", *pretext.SIDES]
    for side in pretext.SIDES:
        assert found[side]["cpu_seconds"] > 0
        assert found[side]["purity"] != found["untrained"]["purity"]
    assert all(0 <= entry[name] <= 1 for entry in found.values() for name in ("knn_acc", "purity"))
    text = pretext.table({"seeds": [found]})
    assert text.count("\n") == 7 and "| lightly |" in text and "± 0.0" in text


def test_table_has_the_standard_error_of_paired_differences() -> None:
    def side(knn: float, seconds: float) -> dict[str, float]:
        return {"knn_acc": knn, "purity": 0.5, "cpu_seconds": seconds}

    seeds = [
        {"untrained": side(0.1, 0), "scan-fast": side(a, 1.0), "lightly": side(b, s)}
        for a, b, s in ((0.5, 0.4, 2.0), (0.6, 0.55, 3.0), (0.7, 0.64, 9.0))
    ]
    text = pretext.table({"seeds": seeds})
    error = math.sqrt(sum((gap - 7) ** 2 for gap in (10, 5, 6)) / 2 / 3)
    assert f"kNN differs by +7.0 (standard error {error:.1f})" in text
    assert "3.00 times as long" in text


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (["model.stem=whitened"], "model.stem=random"),
        (["pretext.optimizer.name=adam"], "pretext.optimizer.name=sgd"),
        (["pretext.method.small_views=2"], "pretext.method.small_views=0"),
    ],
)
def test_what_lightly_lacks_is_named(tmp_path: Path, words: list[str], needed: str) -> None:
    with pytest.raises(ConfigError, match=f"needs {needed}$"):
        pretext.checked(recipe(tmp_path, *words))
