"""Each objective through the clustering stage: the same bits after an interruption, and a run by the command line."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from driving import assignments, metrics, opened, run_here, tensor_hash
from interruptions import Interrupted
from torch import Tensor

from scan_fast.models.heads import ClusterModel
from scan_fast.runs.artifacts import checkpoint
from scan_fast.stages.clustering import Clustering, start_from_kmeans
from scan_fast.stages.handover import Handover
from scan_fast.training.loop import train

OBJECTIVES = (
    "{kind: scan, entropy_weight: 1.0, prior: estimated}",
    "{kind: scan, entropy_weight: 1.0, prior: [9, 8, 7, 6, 5, 4, 3, 2, 1, 1]}",
    "{kind: temi}",
    "{kind: turtle, prior: estimated}",
)


def tensors(value: object, name: str = "") -> dict[str, str]:
    if isinstance(value, Tensor):
        return {name: tensor_hash(value)}
    items = value.items() if isinstance(value, dict) else ()
    return {key: found for part, inner in items for key, found in tensors(inner, f"{name}.{part}").items()}


@pytest.mark.parametrize("update", ["full", "heads"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_interrupted_and_resumed_the_same_bits(objective: str, update: str, finished: Path) -> None:
    def result_of(kinds: list[type[Clustering]]) -> dict[str, str]:
        overrides = (f"clustering.objective={objective}", "clustering.initialize=kmeans", f"clustering.update={update}")
        with opened(finished, *overrides, "runtime.checkpoint_seconds=0", again=True) as context:
            context.run.remove(checkpoint("clustering"))
            for kind in kinds:
                torch.manual_seed(0)
                model, handover = context.place(ClusterModel(context.model_config, 10, 2)), Handover()
                if not context.run.has(checkpoint("clustering")):
                    start_from_kmeans(context, model, handover)
                stage = kind(context, model, handover)
                with contextlib.suppress(KeyboardInterrupt):
                    train(stage, context)
            return tensors({"model": stage.model.state_dict(), "stage": stage.state()})

    whole = result_of([Clustering])
    assert "log_prior" in str(whole.keys()) or "marginal" in str(whole.keys())
    assert whole == result_of([Interrupted, Clustering])


@pytest.mark.parametrize("objective", ["temi", "turtle", "{kind: scan, prior: estimated}"])
def test_a_run_by_the_command_line(objective: str, finished: Path) -> None:
    words = ["cluster", finished, "--again", f"clustering.objective={objective}", "clustering.initialize=kmeans"]
    result = run_here(*words, "--quiet")
    assert result.code == 0, result.err
    result = run_here("run", finished, "--quiet")
    assert result.code == 0, result.err
    entries = [entry for entry in metrics(finished) if entry["stage"] == "clustering"]
    assert len(entries) == 2 and all(entry["loss"] == entry["loss"] for entry in entries)
    assert len({row["cluster"] for row in assignments(finished)}) > 1


def test_sizes_for_another_number_of_clusters_are_refused_before_training(finished: Path) -> None:
    words = ["cluster", finished, "--again", "clustering.objective={kind: scan, prior: [1, 2]}"]
    refusal = run_here(*words, "--quiet").refusal()
    assert "one size for each of the 10 clusters, got 2 sizes" in refusal
