"""The objective seam: SCAN by its definition, and another objective with a teacher and MLP heads."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from driving import opened
from interruptions import Interrupted
from torch import Tensor
from torch.nn import functional as F

from scan_fast.evaluation.model_selection import selection_loss
from scan_fast.losses import scan_loss
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import ClusterModel
from scan_fast.models.moving_average import MovingAverage
from scan_fast.objectives import Heads, Objective, ObjectiveSettings, SCANSettings
from scan_fast.runs.artifacts import checkpoint
from scan_fast.stages.clustering import Clustering, logits_of
from scan_fast.stages.handover import Handover
from scan_fast.stages.inputs import mined_neighbors
from scan_fast.training.loop import train


class AgreementSettings(ObjectiveSettings):
    kind: Literal["agreement"] = "agreement"

    def build(self) -> Agreement:
        return Agreement()


class Agreement(Objective):
    """Heads agree with an averaged teacher on the neighbour; the score is the loss on held-out pairs."""

    def attach(self, model: ClusterModel) -> None:
        self.teacher = MovingAverage(model, 0.9)

    def loss(self, heads: Heads, anchors: Tensor, neighbors: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        with torch.no_grad():
            target = self.teacher.model.heads(neighbors).softmax(dim=-1)
        losses = -(target * heads(anchors).log_softmax(dim=-1)).sum(dim=-1).mean(dim=-1)
        return losses, {"loss": losses.mean()}

    def score(self, logits: Tensor, neighbors: Tensor) -> Tensor:
        total, _, _ = selection_loss(logits.log_softmax(dim=-1), neighbors)
        return -total  # another choice than SCAN's

    def after_step(self) -> None:
        self.teacher.update()

    def state(self) -> dict[str, Any]:
        return {"teacher": self.teacher.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.teacher.load_state_dict(state["teacher"])


def test_scan_is_the_scan_loss() -> None:
    torch.manual_seed(0)
    model = ClusterModel(ModelConfig(backbone="resnet_digits", width=0.25), 5, 3)
    anchors, neighbors = torch.randn(2, 16, model.out_features)
    objective = SCANSettings(entropy_weight=2.5).build()
    losses, metrics = objective.loss(model.heads, anchors, neighbors)
    total, consistency, entropy = scan_loss(model.heads(anchors), model.heads(neighbors), 2.5)
    assert losses.equal(total)
    for name, value in (("loss", total), ("consistency", consistency), ("entropy", entropy)):
        assert metrics[name].equal(value.mean())
    index = torch.randint(0, 16, (16, 3))
    logits = model.heads(anchors)
    torch.testing.assert_close(objective.score(logits, index), selection_loss(logits.softmax(dim=-1), index)[0])


@pytest.mark.parametrize("update", ["full", "heads"])
def test_another_objective_trains_mlp_heads_and_resumes_in_the_same_bits(update: str, finished: Path) -> None:
    overrides: tuple[str, ...] = (
        "model.cluster_head=mlp",
        "model.cluster_hidden_dim=12",
        f"clustering.update={update}",
    )
    overrides += ("clustering.initialize=random", "runtime.checkpoint_seconds=0", "clustering.epochs=2")

    def result_of(kinds: list[type[Clustering]]) -> tuple[dict[str, Tensor], Clustering]:
        with opened(finished, *overrides, again=True) as context:
            context.run.remove(checkpoint("clustering"))
            for kind in kinds:
                torch.manual_seed(0)
                model = context.place(ClusterModel(context.model_config, 10, 2))
                stage = kind(context, model, Handover())
                stage.objective = AgreementSettings().build()
                stage.objective.attach(model)
                with contextlib.suppress(KeyboardInterrupt):
                    train(stage, context)
            teacher = stage.objective.state()["teacher"]
            return {**stage.model.state_dict(), **{f"teacher.{k}": v for k, v in teacher.items()}}, stage

    whole, stage = result_of([Clustering])
    parts, _ = result_of([Interrupted, Clustering])
    assert all(value.equal(parts[name]) for name, value in whole.items())
    assert whole["cluster_head.0.0.weight"].shape[0] == 12
    # The head is the one that this objective's score, minus SCAN's, puts first.
    model = ClusterModel(stage.context.model_config, 10, 2)
    model.load_state_dict(stage.best["model"])
    logits = logits_of(stage.context, model, "test", Handover())
    scores = SCANSettings().build().score(logits, mined_neighbors(stage.context)["test"])
    assert stage.best["head"] == int(scores.argmax())
    assert stage.best["loss"] == pytest.approx(-float(scores.max()), rel=1e-5)


def test_mlp_heads_are_what_they_say() -> None:
    torch.manual_seed(0)
    config = ModelConfig(backbone="resnet_digits", width=0.25, cluster_head="mlp", cluster_hidden_dim=7)
    model = ClusterModel(config, 4, 2)
    features = torch.randn(5, model.out_features)
    logits = model.heads(features)
    assert logits.shape == (2, 5, 4) and model.n_clusters == 4
    for h in range(2):
        state = model.state_dict()
        hidden = F.relu(features @ state[f"cluster_head.{h}.0.weight"].T + state[f"cluster_head.{h}.0.bias"])
        expected = hidden @ state[f"cluster_head.{h}.2.weight"].T + state[f"cluster_head.{h}.2.bias"]
        torch.testing.assert_close(logits[h], expected)
        assert model.head(h).heads(features)[0].equal(logits[h]) and model.head(h).n_clusters == 4
