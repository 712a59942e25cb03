"""BYOL: what its loss compares, how its target moves, what it keeps, and small views of it and of MoCo."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from interruptions import InterruptedPretext
from pretext_training import small_model, trained
from torch import Tensor
from torch.nn import functional as F

from scan_fast.errors import ConfigError
from scan_fast.losses import nt_xent
from scan_fast.methods import (
    BYOLSettings,
    MethodSettings,
    MoCoSettings,
    PretextMethod,
    RotationSettings,
    SIGRegSettings,
    SimCLRSettings,
    VISRegSettings,
)
from scan_fast.methods.byol import BYOL
from scan_fast.methods.moco import MoCo
from scan_fast.models.heads import PretextModel
from scan_fast.stages.pretext import Pretext
from scan_fast.training.context import Context


def _byol(**settings: float | int | str) -> BYOL:
    torch.manual_seed(0)
    method = BYOLSettings.model_validate({"momentum": 0.9, **settings}).build(small_model(), 8)
    assert isinstance(method, BYOL)
    return method


def test_each_view_predicts_the_target_of_the_other() -> None:
    method = _byol(predictor_dim=24)
    with torch.no_grad():  # the target is another network than the online one
        for parameter in method.average.model.parameters():
            parameter.mul_(1.1)
    images = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    # Views of one size pass together, so they share batch statistics.
    first, second = F.normalize(method.predictor(method.model(torch.cat(images))), dim=1).chunk(2)
    target0, target1 = F.normalize(method.average.model(torch.cat(images)), dim=1).chunk(2)
    expected = (((first - target1).square().sum(1) + (second - target0).square().sum(1)) / 2).mean()
    loss, metrics = method.loss(images)
    torch.testing.assert_close(loss, expected)
    assert metrics["loss"] is loss
    loss.backward()
    trained_modules = (method.model, *method.modules())
    assert all(parameter.grad is not None for module in trained_modules for parameter in module.parameters())
    assert all(parameter.grad is None for parameter in method.average.model.parameters())
    assert [layer.out_features for layer in method.predictor if isinstance(layer, torch.nn.Linear)] == [24, 64]
    assert BYOLSettings().passes(8) == pytest.approx(2 + 2 / 3)


def test_views_with_batch_statistics_of_their_own_pass_byol_alone() -> None:
    method = _byol(batch_statistics="per_view")
    images = [torch.randn(4, 3, 8, 8), 5 + torch.randn(4, 3, 8, 8)]
    predictions = [F.normalize(method.predictor(method.model(x)), dim=1) for x in images]
    targets = [F.normalize(method.average.model(x), dim=1) for x in images]
    expected = sum((predictions[i] - targets[1 - i]).square().sum(1).mean() for i in range(2)) / 2
    torch.testing.assert_close(method.loss(images)[0], expected)


@pytest.mark.parametrize("rise_steps", [0, 4])
def test_the_target_follows_by_a_momentum_that_rises(rise_steps: int) -> None:
    method = _byol(rise_steps=rise_steps)
    name = next(name for name, _ in method.model.named_parameters())
    weight, target = (dict(m.named_parameters())[name] for m in (method.model, method.average.model))
    with torch.no_grad():
        weight.add_(1)
    distances = [1.0]
    for _ in range(5):
        method.after_step()
        distances.append((weight - target).mean().item())
    moved = [after / before for before, after in itertools.pairwise(distances)]
    rising = [1 - 0.1 * (math.cos(math.pi * min(step, 4) / 4) + 1) / 2 for step in range(5)]
    assert moved == pytest.approx(rising if rise_steps else [0.9] * 5, abs=1e-5)
    assert method.average.model.training


def test_momentum_fits_the_length_of_the_training() -> None:
    of_steps = {steps: BYOLSettings().for_run(1000, steps) for steps in (50, 500, 100_000)}
    assert [settings.momentum for settings in of_steps.values()] == [0.9, 0.98, 0.996]
    assert [settings.rise_steps for settings in of_steps.values()] == [50, 500, 100_000]
    given = BYOLSettings(momentum=0.5, rise_steps=0).for_run(1000, 500)
    assert (given.momentum, given.rise_steps) == (0.5, 0)


def test_byol_resumes_in_the_same_bits(tmp_path: Path) -> None:
    words = ["pretext.method=byol", "pretext.method.view.kind=affine", "pretext.method.small_views=1"]
    words += ["pretext.method.small_view.kind=affine", "pretext.method.small_view.size=6", "model.projector=mlp_bn"]

    def result_of(folder: Path, stages: Sequence[type[Pretext]]) -> dict[str, Tensor]:
        def build(context: Context, model: PretextModel) -> PretextMethod:
            method = context.config.pretext.method.for_run(len(context.splits.train), 100)
            return method.build(model, context.side)

        model, method = trained(folder, stages, build, *words)
        state = method.state()
        assert state["step"] > 3
        return {
            **model.state_dict(),
            **{f"p.{k}": v for k, v in state["predictor"].items()},
            **{f"a.{k}": v for k, v in state["average"].items()},
        }

    whole, parts = (
        result_of(tmp_path / "whole", [Pretext]),
        result_of(tmp_path / "parts", [InterruptedPretext, Pretext]),
    )
    assert whole.keys() == parts.keys()
    assert all(value.equal(parts[name]) for name, value in whole.items())


def test_small_views_predict_both_large_ones() -> None:
    method = _byol(small_views=1)
    method.model.eval()
    method.predictor.eval()
    method.average.model.eval()
    assert [view.side for view in method.views(0, 1)] == [8, 8, 4]
    images = [torch.randn(5, 3, side, side) for side in (8, 8, 4)]
    a, b, small = (method.predictor(method.model(x)) for x in images)
    first, second = (method.average.model(x) for x in images[:2])
    cosines = [F.cosine_similarity(p, t).mean() for p, t in ((a, second), (b, first), (small, first), (small, second))]
    torch.testing.assert_close(method.loss(images)[0], 2 - 2 * torch.stack(cosines).mean())


def test_small_views_are_queries_of_moco() -> None:
    torch.manual_seed(0)
    method = MoCoSettings(small_views=1, queue_size=7, temperature=0.3).build(small_model().eval(), 8)
    assert isinstance(method, MoCo)
    assert [view.side for view in method.views(0, 1)] == [8, 8, 4]
    assert MoCoSettings(small_views=1).passes(8) == pytest.approx(1 + 1 / 3 + 1 / 4)
    images = [torch.randn(5, 3, side, side) for side in (8, 8, 4)]
    keys = method.average.model(images[1])
    losses = [nt_xent(method.model(images[v]), keys, 0.3, anchors="first", queue=method.queue) for v in (0, 2)]
    torch.testing.assert_close(method.loss(images)[0], torch.stack(losses).mean())


@pytest.mark.parametrize(
    "settings", [SimCLRSettings(), MoCoSettings(), BYOLSettings(), SIGRegSettings(), VISRegSettings()]
)
def test_a_single_image_is_refused(settings: MethodSettings) -> None:
    message = f"pretext.method={settings.kind} compares the images of a batch, so it needs at least 2 .* got 1"
    with pytest.raises(ConfigError, match=message):
        settings.for_run(1, 10)
    settings.for_run(2, 10)


def test_rotations_of_a_single_image_can_be_told_apart() -> None:
    assert RotationSettings().for_run(1, 10) == RotationSettings()
