"""The clustering objectives over several ranks, against one process with the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_checks import Checks, join, leave, mean_over_ranks, own_rows, same_everywhere
from ranks import answers_by_rank
from torch import Tensor

from scan_fast import distributed
from scan_fast.models.heads import ClusterModel
from scan_fast.objectives import Objective, ObjectiveSettings, SCANSettings, TEMISettings, TURTLESettings
from scan_fast.objectives.turtle import probe_log_probabilities
from scan_fast.partitions.heads import train_heads

SIZES = (4.0, 3.0, 2.0, 1.0, 1.0)
CASES: dict[str, ObjectiveSettings] = {
    "scan": SCANSettings(),
    "scan with estimated sizes": SCANSettings(prior="estimated"),
    "scan with given sizes": SCANSettings(prior=SIZES, entropy_weight=2.0),
    "temi": TEMISettings(decay=0.8, marginal_decay=0.7),
    "temi without weights": TEMISettings(decay=0.8, marginal_decay=0.7, weighted=False),
    "turtle": TURTLESettings(inner_lr=0.05),
    "turtle with given sizes": TURTLESettings(inner_lr=0.05, prior=SIZES),
}
STEPS, FEATURES, CLUSTERS = 3, 9, 5


def batch_of(rows: int, step: int) -> tuple[Tensor, Tensor]:
    """Return features (rows, D) float64 of images and neighbours in blobs, the same on every rank.

    The blobs follow each other, so that ranks have other clusters.
    """
    generator = torch.Generator().manual_seed(step)
    centres = 3 * torch.randn(CLUSTERS, FEATURES, generator=generator, dtype=torch.float64)
    centre = centres[torch.arange(rows) * CLUSTERS // rows]
    first, second = torch.randn(2, rows, FEATURES, generator=generator, dtype=torch.float64)
    return centre + first, centre + 0.5 * first + second


def objective_of(settings: ObjectiveSettings, heads: int, dtype: torch.dtype) -> tuple[Objective, ClusterModel]:
    """Build an objective and linear heads, the same on every rank."""
    torch.manual_seed(0)
    model = ClusterModel.linear(FEATURES, CLUSTERS, heads).to(dtype)
    objective = settings.build()
    objective.attach(model)
    objective.start(lambda: model.heads(batch_of(40, 99)[0].to(dtype)).detach().float())
    return objective, model


def trained(
    objective: Objective, model: ClusterModel, batch: tuple[Tensor, Tensor]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Take one step; return losses, metrics and gradients, averaged over the ranks if there are several."""
    average = mean_over_ranks if distributed.several() else torch.clone
    losses, metrics = objective.loss(model.heads, *batch)
    losses.sum().backward()
    names, gradients = sorted(metrics), {}
    values = average(torch.stack([metrics[name].detach().double() for name in names]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            gradients[name] = average(parameter.grad.double())  # as DistributedDataParallel does
            parameter.sub_(0.1 * gradients[name])
            parameter.grad = None
    objective.after_step()
    return average(losses.detach().double()), dict(zip(names, values, strict=True)), gradients


def check_objective(
    checks: Checks, name: str, rows: int, heads: int, dtype: torch.dtype, rank: int, world: int
) -> None:
    # SCAN computes the divergence from a prior in float32.
    rtol = 1e-9 if dtype == torch.float64 and not name.startswith("scan with") else 1e-5
    ours, theirs = objective_of(CASES[name], heads, dtype), objective_of(CASES[name], heads, dtype)
    for step in range(STEPS):
        batch = tuple(x.to(dtype) for x in batch_of(world * rows, step))
        own = tuple(own_rows(x, rank, world) for x in batch)
        losses, metrics, gradients = trained(*ours, (own[0], own[1]))
        with distributed.alone():
            expected_losses, expected_metrics, expected = trained(*theirs, (batch[0], batch[1]))
        case = f"{name}, {rows} rows, {heads} heads, {dtype}, step {step}"
        checks.close(f"{case}: loss", losses, expected_losses, rtol)
        checks.true(f"{case}: metrics", metrics.keys() == expected_metrics.keys())
        for key, value in expected_metrics.items():
            checks.close(f"{case}: {key}", metrics[key], value, rtol, 1e-6)
        for key, value in expected.items():
            checks.close(f"{case}: gradient of {key}", gradients[key], value, rtol, rtol * 0.1)
    state, whole = ours[0].state(), theirs[0].state()
    for key in ("marginal", "log_prior"):
        if key in state:
            checks.close(f"{case}: {key}", state[key], whole[key], rtol)
            checks.true(f"{case}: {key} on all ranks", same_everywhere(state[key]))
    for key, value in ours[1].state_dict().items():
        checks.true(f"{case}: {key} on all ranks", same_everywhere(value))


def check_probes(checks: Checks, rank: int, world: int) -> None:
    """Check that probes learn the labels of all ranks, from features in bfloat16 as under autocast."""
    features, _ = batch_of(world * 6, 0)
    objective, model = objective_of(TURTLESettings(inner_lr=0.05), 2, torch.float32)
    features = features.bfloat16()
    labels = model.heads(features.float()).detach().softmax(dim=-1)
    expected = probe_log_probabilities(features, labels, 10, 0.05)
    found: Tensor = objective._log_q(own_rows(features, rank, world), own_rows(labels, rank, world, 1))  # type: ignore[attr-defined]
    checks.close("probes in bfloat16", found, own_rows(expected, rank, world, 1), 1e-4)


def check_heads_of_features(checks: Checks) -> None:
    """Check that heads on frozen features, which each rank trains on all images, do not wait for other ranks."""
    features, _ = batch_of(30, 5)
    features = torch.nn.functional.normalize(features.float(), dim=1)
    neighbors = (features @ features.T).topk(4).indices
    for settings in (TEMISettings(), TURTLESettings(), SCANSettings()):
        # Unequal numbers of epochs would hang if they did.
        epochs = 1 + distributed.current().rank
        result = train_heads(features, neighbors, settings, n_clusters=3, seed=0, heads=2, epochs=epochs, batch_size=16)
        checks.true(f"{settings.kind} on features", bool(result.logits.isfinite().all()))
    checks.true("several again", distributed.several())


def one_rank_of_objectives(rank: int, store: str, world: int, results: Any) -> None:
    join(rank, store, world)
    checks = Checks()
    for name in CASES:
        for rows, heads, dtype in ((7, 1, torch.float64), (7, 3, torch.float64), (16, 2, torch.float32)):
            check_objective(checks, name, rows, heads, dtype, rank, world)
    check_probes(checks, rank, world)
    check_heads_of_features(checks)
    leave(rank, checks, results)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_the_objectives_of_ranks_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """Losses, gradients and running means of some steps."""
    for _, differences, done in answers_by_rank(one_rank_of_objectives, tmp_path, world, seconds=300):
        assert not differences, "\n".join(differences)
        assert done > 300
