"""The pretext method seam: another method trains, keeps its state and resumes, in files of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from driving import opened
from interruptions import InterruptedPretext
from pretext_training import small_model, trained
from torch import Tensor, nn
from torch.nn import functional as F

from scan_fast.errors import ConfigError, WeightsError
from scan_fast.losses import nt_xent
from scan_fast.methods import MethodSettings, NoneSettings, PretextMethod, SimCLR, SimCLRSettings, WeightsSettings
from scan_fast.models.heads import PretextModel
from scan_fast.models.moving_average import MovingAverage
from scan_fast.stages.pretext import Pretext
from scan_fast.training.context import Context
from scan_fast.views.parameters import AffineView, View


class BootstrapSettings(MethodSettings):
    kind: Literal["bootstrap"] = "bootstrap"

    def build(self, model: PretextModel, size: int) -> Bootstrap:
        return Bootstrap(model, size)


class Bootstrap(PretextMethod):
    """A BYOL in 20 lines: a predictor that trains, a moving average, and two views of different size."""

    def __init__(self, model: PretextModel, size: int) -> None:
        super().__init__(model)
        *_, last = model.contrastive_head.modules()
        assert isinstance(last, nn.Linear)
        self.predictor = nn.Linear(last.out_features, 64)
        self.average = MovingAverage(model, 0.9)
        self.size = size

    def views(self, epoch: int, epochs: int) -> Sequence[View]:
        return AffineView(size=self.size), AffineView(size=self.size - 2)

    def loss(self, images: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert [x.shape[-1] for x in images] == [self.size, self.size - 2]
        with torch.no_grad():
            target = self.average.model(images[1])
        loss = -F.cosine_similarity(self.predictor(self.model(images[0])), target).mean()
        return loss, {"loss": loss}

    def modules(self) -> list[nn.Module]:
        return [self.predictor]

    def after_step(self) -> None:
        self.average.update()

    def state(self) -> dict[str, Any]:
        return {"predictor": self.predictor.state_dict(), "average": self.average.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.predictor.load_state_dict(state["predictor"])
        self.average.load_state_dict(state["average"])


def test_another_method_trains_and_resumes_in_the_same_bits(tmp_path: Path) -> None:
    def result_of(folder: Path, stages: Sequence[type[Pretext]]) -> dict[str, Tensor]:
        model, method = trained(folder, stages, lambda context, model: Bootstrap(model, context.splits.train.size))
        average = next(method.average.model.parameters())
        return {**model.state_dict(), **method.state()["predictor"], "average": average}

    whole, parts = (
        result_of(tmp_path / "whole", [Pretext]),
        result_of(tmp_path / "parts", [InterruptedPretext, Pretext]),
    )
    assert whole.keys() == parts.keys()
    assert all(value.equal(parts[name]) for name, value in whole.items())


@pytest.mark.parametrize("kind", ["simclr", "sigreg", "visreg"])
def test_shipped_methods_resume_in_the_same_bits(kind: str, tmp_path: Path) -> None:
    settings = [f"pretext.method={kind}", "pretext.method.view.kind=affine", "pretext.method.small_views=2"]
    settings += ["pretext.method.small_view.kind=affine", "pretext.method.small_view.size=6"]
    settings += [f"model.projector={'mlp' if kind == 'simclr' else 'mlp_bn'}"]

    def result_of(folder: Path, stages: Sequence[type[Pretext]]) -> dict[str, Tensor]:
        def build(context: Context, model: PretextModel) -> PretextMethod:
            return context.config.pretext.method.build(model, context.side)

        return trained(folder, stages, build, *settings)[0].state_dict()

    whole, parts = (
        result_of(tmp_path / "whole", [Pretext]),
        result_of(tmp_path / "parts", [InterruptedPretext, Pretext]),
    )
    assert all(value.equal(parts[name]) for name, value in whole.items())


def test_a_projector_without_normalisation_is_refused(tmp_path: Path) -> None:
    message = "pretext.method=sigreg needs model.projector=mlp_bn, got mlp"
    with pytest.raises(ConfigError, match=message), opened(tmp_path, "pretext.method=sigreg"):
        pass


def test_small_views_are_compared_with_both_large_ones() -> None:
    torch.manual_seed(0)
    settings = SimCLRSettings(small_views=2, temperature=0.3)
    method = settings.build(small_model().eval(), 8)
    views = method.views(0, 1)
    assert [view.side for view in views] == [8, 8, 4, 4]
    assert settings.passes(8) == 2 + 2 / 4
    images = [torch.randn(5, 3, view.side, view.side) for view in views]
    a, b, c, d = (method.model(x) for x in images)
    pairs = [(a, b), (a, c), (b, c), (a, d), (b, d)]
    expected = torch.stack([nt_xent(first, second, 0.3) for first, second in pairs]).mean()
    torch.testing.assert_close(method.loss(images)[0], expected)


@pytest.mark.parametrize("statistics", ["joint", "per_view"])
def test_views_share_batch_statistics_or_have_their_own(statistics: str) -> None:
    torch.manual_seed(0)
    settings = SimCLRSettings.model_validate({"small_views": 2, "batch_statistics": statistics})
    method = settings.build(small_model().train(), 8)
    images = [3 * number + torch.randn(5, 3, view.side, view.side) for number, view in enumerate(method.views(0, 1))]
    if statistics == "per_view":
        expected = [method.model(x) for x in images]
    else:
        expected = [*method.model(torch.cat(images[:2])).chunk(2), *method.model(torch.cat(images[2:])).chunk(2)]
    for rows, of_view in zip(method.embed(images), expected, strict=True):
        torch.testing.assert_close(rows, of_view)


def test_settings_create_their_method() -> None:
    model = PretextModel.__new__(PretextModel)
    nn.Module.__init__(model)
    method = BootstrapSettings().build(model=small_model(), size=8)
    assert isinstance(method, Bootstrap)
    assert isinstance(SimCLRSettings().build(small_model(), 8), SimCLR)
    for settings in (NoneSettings(), WeightsSettings(file=Path("x"))):
        assert not settings.trains
        with pytest.raises(NotImplementedError, match="does not train"):
            settings.build(small_model(), 8)
    with pytest.raises(NotImplementedError, match="SimCLRSettings trains"):
        SimCLRSettings().load(small_model())


def test_simclr_grows_its_views() -> None:
    settings = SimCLRSettings(resolutions=((0.35, 4), (0.7, 6)))
    method = settings.build(small_model(), 8)
    sizes = [[view.side for view in method.views(epoch, 10)] for epoch in range(10)]
    assert sizes == [[4, 4]] * 4 + [[6, 6]] * 3 + [[8, 8]] * 3


def test_weights_of_another_stage_are_refused(tmp_path: Path) -> None:
    """A self-label file of the reference project is no pretext model."""
    state = {f"backbone.{name}": value for name, value in small_model().backbone.state_dict().items()}
    state |= {"cluster_head.0.weight": torch.zeros(10, 16), "cluster_head.0.bias": torch.zeros(10)}
    torch.save(state, tmp_path / "model.pth.tar")
    with pytest.raises(WeightsError, match="holds a selflabel model; stage one needs a pretext model"):
        WeightsSettings(file=tmp_path / "model.pth.tar").load(small_model())
