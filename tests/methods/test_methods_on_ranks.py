"""The pretext methods over several ranks, against one process with the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_checks import Checks, join, leave, mean_over_ranks, own_rows, same_everywhere
from ranks import answers_by_rank
from torch import Tensor, nn
from torch.nn import functional as F

from scan_fast import distributed
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
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import PretextModel

ROWS, STEPS = 5, 3
"""Images of each rank in a batch, and batches."""
CASES: dict[str, MethodSettings] = {
    "simclr": SimCLRSettings(),
    "simclr of first anchors and small views": SimCLRSettings(anchors="first", small_views=2),
    "moco": MoCoSettings(queue_size=23, momentum=0.9),
    "moco with a queue shorter than the batch": MoCoSettings(queue_size=7, momentum=0.9),
    "moco with small views": MoCoSettings(queue_size=40, momentum=0.9, small_views=1),
    "byol": BYOLSettings(momentum=0.9, small_views=1),
    "sigreg": SIGRegSettings(directions=16),
    "visreg": VISRegSettings(directions=17),
    "rotation": RotationSettings(),
}


class Pixels(nn.Module):
    """Some numbers of an image of any size, by one linear layer: a network in which images do not meet."""

    def __init__(self) -> None:
        super().__init__()
        self.out_features = 24
        self.linear = nn.Linear(3 * 4 * 4, self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(F.adaptive_avg_pool2d(x, 4).flatten(1)).tanh()
        return found


def method_of(settings: MethodSettings) -> PretextMethod:
    """Build a method, the same on every rank."""
    torch.manual_seed(0)
    model = PretextModel(ModelConfig(backbone="resnet18_cifar", width=0.125, projection_dim=16, projector="mlp"))
    model.backbone, model.out_features = Pixels(), 24
    model.contrastive_head = nn.Sequential(nn.Linear(24, 20), nn.ReLU(), nn.Linear(20, 16))
    method = settings.build(model, 8)
    for module in method.modules():
        module.eval()  # statistics of a batch are not the subject here
    return method


def batch_of(method: PretextMethod, rows: int, step: int) -> list[Tensor]:
    """Return the views of a batch's images, the same on every rank; views of one image are alike."""
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(rows, 3, 8, 8, generator=generator)
    sides = [view.side for view in method.views(0, 1)]
    noise = [0.3 * torch.randn(rows, 3, side, side, generator=generator) for side in sides]
    return [F.adaptive_avg_pool2d(images, side) + noise[n] for n, side in enumerate(sides)]


def trained(method: PretextMethod, batch: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Take one step; return the metrics and the gradients, both averaged over the ranks if there are several."""
    modules = [method.model, *method.modules()]
    parameters = {f"{n}.{name}": p for n, m in enumerate(modules) for name, p in m.named_parameters()}
    loss, metrics = method.loss(batch)
    loss.backward()
    average = mean_over_ranks if distributed.several() else torch.clone
    names, gradients = sorted(metrics), {}
    values = average(torch.stack([metrics[name].detach() for name in names]).double())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.grad is None:
                continue
            gradients[name] = average(parameter.grad.double())  # as DistributedDataParallel does
            parameter.sub_(0.1 * gradients[name])
            parameter.grad = None
    method.after_step()
    return dict(zip(names, values, strict=True)), gradients


def check_method(checks: Checks, name: str, rank: int, world: int) -> None:
    ours, theirs = method_of(CASES[name]), method_of(CASES[name])
    for step in range(STEPS):
        batch = batch_of(ours, world * ROWS, step)
        metrics, gradients = trained(ours, [own_rows(x, rank, world) for x in batch])
        with distributed.alone():
            expected_metrics, expected = trained(theirs, batch)
        for key, value in expected_metrics.items():
            checks.close(f"{name}, step {step}: {key}", metrics[key], value, 1e-5)
        checks.true(f"{name}, step {step}: parameters with a gradient", gradients.keys() == expected.keys())
        largest = max(float(x.abs().max()) for x in expected.values())
        for key, value in expected.items():
            checks.close(f"{name}, step {step}: gradient of {key}", gradients[key], value, 1e-5, 1e-5 * largest)
    state, whole = ours.state(), theirs.state()
    for key in ("queue", "next", "step"):
        if key in state:
            found, expected_state = torch.as_tensor(state[key]), torch.as_tensor(whole[key])
            checks.close(f"{name}: {key}", found, expected_state, 1e-5)
            checks.true(f"{name}: {key} on all ranks", same_everywhere(found))
    for key, value in ours.model.state_dict().items():
        checks.true(f"{name}: {key} on all ranks", same_everywhere(value))


def one_rank_of_methods(rank: int, store: str, world: int, results: Any) -> None:
    join(rank, store, world)
    checks = Checks()
    for name in CASES:
        check_method(checks, name, rank, world)
    leave(rank, checks, results)


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
@pytest.mark.parametrize("world", [2, 4])
def test_the_methods_of_ranks_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """Losses, gradients and queues of some steps."""
    for _, differences, done in answers_by_rank(one_rank_of_methods, tmp_path, world, seconds=300):
        assert not differences, "\n".join(differences)
        assert done > 200
