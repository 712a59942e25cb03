"""The training step: what it sums, what a captured one computes, and that a run computes nothing twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from driving import TINY, opened, results, run_here, summary
from torch import Tensor, nn

from scan_fast.data.sources import Source
from scan_fast.runs.config import OptimizerConfig
from scan_fast.stages.pipeline import run_stages, stages_of
from scan_fast.training.context import Context
from scan_fast.training.optimizers import build_optimizer, fit_to_device, write_learning_rate
from scan_fast.training.step import WARM_UP_STEPS, TrainingStep
from scan_fast.views.maker import ViewMaker


class Regression:
    """A small network with batch statistics, and a moving sum that follows each update."""

    def __init__(self, device: str) -> None:
        torch.manual_seed(0)
        # No bias before the normalisation: its gradient would be rounding alone, which Adam makes as large as any.
        layers = (nn.Linear(4, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))
        self.model = nn.Sequential(*layers).to(device)
        self.trace = torch.zeros((), device=device)

    def step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        loss = (self.model(x) - y).square().mean()
        return loss, {"loss": loss, "rows": torch.full((), len(x), device=x.device)}

    def after_step(self) -> None:
        self.trace.add_(next(self.model.parameters()).detach().sum())


def run_steps(
    device: str, name: str, *, capture: bool, steps: int = WARM_UP_STEPS + 5, small_steps: int = 0
) -> dict[str, Any]:
    stage = Regression(device)
    config = OptimizerConfig(name=name, lr=0.05, weight_decay=0.01)  # type: ignore[arg-type]
    optimizer = build_optimizer(list(stage.model.parameters()), config)
    said: list[str] = []
    do = TrainingStep(stage, optimizer, lambda: torch.autocast(device, enabled=False), capture=capture, say=said.append)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        write_learning_rate(optimizer, 0.05 / (1 + step))
        x = torch.randn(8 if step < small_steps else 16, 4, generator=generator).to(device)
        do((x, x.sum(dim=1, keepdim=True)))
    assert said == []
    averages = do.averages(steps)
    do.reset()
    assert set(do.averages(1).values()) == {0.0}
    return {"model": stage.model.state_dict(), "trace": stage.trace, **averages}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_steps_follow_the_plain_loop(name: str) -> None:
    found = run_steps("cpu", name, capture=False)
    stage = Regression("cpu")
    optimizer = {
        "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
        "adam": lambda p: torch.optim.Adam(p, 0.05, weight_decay=0.01),
        "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.01),
    }[name](stage.model.parameters())
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(WARM_UP_STEPS + 5):
        optimizer.param_groups[0]["lr"] = 0.05 / (1 + step)
        x = torch.randn(16, 4, generator=generator)
        loss, _ = stage.step((x, x.sum(dim=1, keepdim=True)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(found["model"], stage.model.state_dict(), rtol=1e-4, atol=1e-6)
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["rows"] == 16


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_a_captured_step_is_the_same_step(name: str) -> None:
    plain, captured = (run_steps("cuda", name, capture=capture) for capture in (False, True))
    torch.testing.assert_close(captured, plain, rtol=1e-5, atol=1e-6)
    # Views that grow: another graph for every shape.
    steps, small = 2 * (WARM_UP_STEPS + 5), WARM_UP_STEPS + 5
    grown = [run_steps("cuda", name, capture=c, steps=steps, small_steps=small) for c in (False, True)]
    torch.testing.assert_close(*grown, rtol=1e-4, atol=1e-5)


def test_sums_go_on_from_a_checkpoint() -> None:
    stage = Regression("cpu")
    do = TrainingStep(stage, build_optimizer(list(stage.model.parameters()), OptimizerConfig()), torch.no_grad)
    do.reset({"loss": torch.tensor(3.0, dtype=torch.float64)})
    do.reset({"loss": torch.tensor(4.0, dtype=torch.float64), "rows": torch.tensor(1.0, dtype=torch.float64)})
    assert do.averages(2) == {"loss": 2.0, "rows": 0.5}


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_the_learning_rate_lies_where_the_weights_are(device: str) -> None:
    for name in ("sgd", "adam"):
        weight = nn.Parameter(torch.zeros(3, device=device))
        optimizer = build_optimizer([weight], OptimizerConfig(name=name))
        # As a checkpoint of the other kind of device leaves it.
        optimizer.param_groups[0]["lr"] = 0.5 if device == "cuda" else torch.tensor(0.5)
        fit_to_device(optimizer)
        rate = optimizer.param_groups[0]["lr"]
        assert isinstance(rate, Tensor) == (device == "cuda")
        assert float(rate) == 0.5
        write_learning_rate(optimizer, 0.25)
        assert float(optimizer.param_groups[0]["lr"]) == 0.25


PRETEXT_AND_MINING, SELFLABEL = ["train", "test"], ["test", "train"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((), [*PRETEXT_AND_MINING, "test", "test", "train", "test", *SELFLABEL]),
        # The frozen backbone's features serve the start, the choice of a head and the result.
        (
            ("clustering.update=heads", "clustering.initialize=kmeans"),
            [*PRETEXT_AND_MINING, "train", "test", *SELFLABEL],
        ),
        # ... and the neighbours, where they are searched among these.
        (
            ("clustering.update=heads", "clustering.initialize=kmeans", "mining.features=backbone"),
            [*PRETEXT_AND_MINING, *SELFLABEL],
        ),
    ],
)
def test_a_run_passes_the_images_through_each_finished_model_once(
    overrides: tuple[str, ...], expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[str] = []
    views_of = Context.views_of

    def noted(self: Context, source: Source, stage: str) -> ViewMaker:
        if stage == "evaluation":
            names = {id(self.splits.train): "train", id(self.splits.test): "test"}
            passes.append(names.get(id(source), "sample"))
        return views_of(self, source, stage)

    monkeypatch.setattr(Context, "views_of", noted)
    with opened(tmp_path / "run", *overrides) as context:
        run_stages(context, stages_of(context))
    assert passes == [*expected, "sample"]  # of the trained backbone's features, for the model's typicality
    # Other processes make again what is not on disk, and find the same.
    before = results(tmp_path / "run")
    assert run_here("mine", tmp_path / "run", "--again", "--quiet").code == 0
    for command in ("cluster", "run"):
        assert run_here(command, tmp_path / "run", "--quiet").code == 0
    assert results(tmp_path / "run") == before


@pytest.mark.slow
def test_compiled_training_ends_where_plain_training_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    words = ("pretext", "digits", *TINY, "--quiet")
    found = {}
    for name in ("plain", "cold", "warm"):
        compile_it = name != "plain"
        assert run_here(*words, "--out", tmp_path / name, f"runtime.compile={compile_it}").code == 0
        torch._dynamo.reset()
        note = summary(tmp_path / name)["stages"]["pretext"].get("compilation")
        assert (note is not None) == compile_it
        assert note is None or (note["cache"] == name and note["seconds"] > 0)
        found[name] = torch.load(tmp_path / name / "checkpoints" / "pretext-final.pt", weights_only=True)["model"]
        assert found[name].keys() == found["plain"].keys()
    for key, value in found["plain"].items():
        torch.testing.assert_close(found["cold"][key], value, rtol=0.05, atol=0.02)
        assert found["warm"][key].equal(found["cold"][key])
