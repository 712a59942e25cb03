"""The benchmark of a step: what it counts, and that a way that fails is named."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import step
from scan_fast.runs.config import find_config, load_config

SMALL = (
    "model.backbone=resnet_digits",
    "model.width=0.25",
    "model.projector=linear",
    "model.projection_dim=16",
    "pretext.batch_size=8",
    "precision=float32",
)


def measured(**options: Any) -> dict[str, Any]:
    config = load_config(find_config("cifar10"), SMALL, {"runtime.device": "cpu"})
    return step.measure(config, "cpu", images=32, steps=1, quick=True, **options)


def test_ways_times_and_flops() -> None:
    saved: list[dict[str, Any]] = []
    result = measured(ways=["plain"], save=lambda result: saved.append(dict(result)))
    assert list(result["ways"]) == ["plain"]
    assert ["profile" in state for state in saved] == [False, True]  # an interrupted run leaves what it had
    way = result["ways"]["plain"]
    assert way["views_per_second"] == pytest.approx(16 / way["seconds"])
    # A stem of 3 to 8 channels at 32x32; a block of 8 to 8; two of 8 to 16 and 16 to 16 at 16x16, the first with a 1x1
    # shortcut; the projector. Each is done three times, but for the gradient of the images.
    stem = 32 * 32 * 3 * 8 * 9
    rest = 32 * 32 * 2 * 8 * 8 * 9 + 16 * 16 * (8 * 16 * 9 + 3 * 16 * 16 * 9 + 8 * 16) + 16 * 16
    assert result["flops"] == 2 * 16 * (2 * stem + 3 * rest)
    assert 0 < way["of_product_peak"] < 1
    seconds = [entry["seconds"] for entry in result["profile"]]
    assert seconds == sorted(seconds, reverse=True)
    assert any("batch_norm" in entry["name"] for entry in result["profile"])


def test_a_way_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(networks: Any) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(step, "compile_networks", refuse)
    result = measured()
    assert result["ways"]["compiled"] == {"failed": "RuntimeError: no compiler here"}
    assert "failed" not in result["ways"]["plain"]
    assert "graph" not in result["ways"]  # of GPUs alone
    assert "no compiler here" in step.describe_way("compiled", result["ways"]["compiled"])
