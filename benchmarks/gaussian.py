"""Cost of SIGReg and VISReg, alone and in a training step: ``python -m benchmarks.gaussian [--json FILE]``.

Answers whether a fused kernel would pay. The step is that of the pretext stage on a ResNet-18 for 32-pixel images with
a quarter of the width: two views of a batch, forward, backward and update, without the views. All times are CPU seconds
of the process on one thread, so a busy machine matters little; medians over ``--rounds``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scan_fast.losses import sigreg_loss, visreg_loss
from scan_fast.methods import SIGRegSettings, VISRegSettings
from scan_fast.models.backbones import ModelConfig
from scan_fast.models.heads import PretextModel
from scan_fast.ops import reference

from .environment import describe
from .files import write_json

DIM, DIRECTIONS, BATCH, SIDE = 128, 256, 256, 32
BATCHES = (256, 2048)
FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigreg": sigreg_loss,
    "sigreg, reference": reference.sigreg,
    "visreg": visreg_loss,
}


def median_seconds(run: Callable[[], object], rounds: int) -> float:
    """Return the median CPU seconds of a call, after one that is not counted."""
    run()
    samples = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        samples.append(time.process_time() - begin)
    return statistics.median(samples)


def backward(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, directions: Tensor) -> Tensor:
    """Return the gradient of a loss."""
    return torch.autograd.grad(loss(z, directions), z)[0]


def measure_alone(rounds: int) -> list[dict[str, Any]]:
    """Time forward and backward passes of each form on one batch of embeddings."""
    results = []
    for rows in BATCHES:
        z, directions = torch.randn(rows, DIM, requires_grad=True), torch.randn(DIRECTIONS, DIM)
        for name, loss in FORMS.items():
            seconds = median_seconds(partial(backward, loss, z, directions), rounds)
            results.append({"loss": name, "batch": rows, "seconds": seconds})
    return results


def measure_step(rounds: int) -> list[dict[str, Any]]:
    """Time a training step, and the method's losses of both views in it."""
    results = []
    for settings in (SIGRegSettings(directions=DIRECTIONS), VISRegSettings(directions=DIRECTIONS)):
        config = ModelConfig(backbone="resnet18_cifar", width=0.25, projector="mlp_bn", projection_dim=DIM)
        model = PretextModel(config)
        method = settings.build(model, SIDE)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
        images = [torch.randn(BATCH, 3, SIDE, SIDE) for _ in range(2)]

        def step(method: Any = method, optimizer: Any = optimizer, images: Any = images) -> None:
            optimizer.zero_grad()
            method.loss(images)[0].backward()
            optimizer.step()
            method.after_step()

        rows = [torch.randn(BATCH, DIM, requires_grad=True) for _ in range(2)]

        def losses(method: Any = method, rows: Any = rows, measure: Any = settings.measure) -> None:
            directions = method.directions.draw(DIM)
            torch.autograd.grad(sum(measure(z, directions) for z in rows), rows)

        of_step, of_loss = median_seconds(step, rounds), median_seconds(losses, 5 * rounds)
        results.append(
            {"method": settings.kind, "step_seconds": of_step, "loss_seconds": of_loss, "share": of_loss / of_step}
        )
    return results


def table(result: dict[str, Any]) -> str:
    """Return both tables in Markdown."""
    lines = ["| loss | batch | ms |", "|---|---:|---:|"]
    lines += [f"| {case['loss']} | {case['batch']:,} | {1e3 * case['seconds']:.1f} |" for case in result["alone"]]
    lines += ["", "| method | step, ms | losses of both views, ms | share |", "|---|---:|---:|---:|"]
    for case in result["step"]:
        times = f"{1e3 * case['step_seconds']:.0f} | {1e3 * case['loss_seconds']:.1f}"
        lines.append(f"| {case['method']} | {times} | {100 * case['share']:.2f} % |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="steps that are timed; the losses run 5 times as often")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    result: dict[str, Any] = {"benchmark": "gaussian", "device": "cpu", "environment": describe("cpu")}
    result |= {"dim": DIM, "directions": DIRECTIONS, "rounds": options.rounds}
    result["alone"] = measure_alone(5 * options.rounds)
    result["step"] = measure_step(options.rounds)
    print(table(result))
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
