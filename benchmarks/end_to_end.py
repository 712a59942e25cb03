"""Every stage of a run, ours against plain PyTorch written the usual way: ``python -m benchmarks.end_to_end``.

    python -m benchmarks.end_to_end --device cpu --data FOLDER [--budget SECONDS] [--json FILE] [section.key=value ...]

The images are those below ``--data``; without it, 2,000 synthetic JPEG files of 32x32 pixels are made. Both sides use
the ``paper`` preset of ``--config``. The baseline, ``benchmarks/baseline.py``, is written in the style of the paper's
time: PIL in loader workers, contiguous float32, losses composed of PyTorch operations, ``.item()`` in every step.

Each stage runs in one process: both sides start from the same weights and train in turns, an epoch each. The first
epoch is reported as cold (start of threads and workers, compilation, caches), the median of the others as warm.
``images/s`` counts training images. ``of peak`` compares with the time that the convolutions and matrix products of the
network, forward and backward, would need at the rate of a large matrix product (of AMX tiles in the first-level cache,
if there are any), and at that of one forward convolution of PyTorch in the middle of the network, measured in this
process at the contender's precision. ``of convolutions`` is the share of our epoch that the network's own convolutions,
forward and backward, take when they are measured alone (:mod:`benchmarks.layers`), before and after the epoch, and
``of PyTorch's`` the same with PyTorch's algorithms: above 100 % if the epoch is faster than those alone. The parts of a
step are measured in separate steps, waiting for each part. ``waiting`` is, for ours, the time of an epoch
beyond its parts, and for the baseline the time that its loop waits for the workers.

Before that, both make a few float32 steps on the same rendered views, and the losses of every step are compared.

Mining is timed as a whole (features and neighbours), and the search alone on 50,000 x 128 against faiss.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scan_fast.data.loader import steps_per_epoch
from scan_fast.runs.artifacts import PRETEXT_MODEL
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.records import StageResult
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.handover import Handover
from scan_fast.stages.mining import run_mining
from scan_fast.training.context import Context, open_context
from scan_fast.training.loop import train
from scan_fast.training.process import kept_memory

from . import baseline, baseline_images, neighbors
from .ceilings import measure_ceilings, measure_convolution
from .environment import describe
from .family import human_seconds, run_family
from .files import write_json
from .harness import QUICK, Effort
from .layers import Convolutions, convolutions_of_step
from .stage_pairs import (
    Images,
    Pair,
    baseline_parts,
    compare_losses,
    default_workers,
    largest_difference,
    make_pair,
    open_images,
    our_parts,
    training_flops,
    write_images,
)
from .targets import SEARCH_SIZE

SYNTHETIC_IMAGES = 2000
STAGES = ("pretext", "mining", "clustering", "selflabel")
PARTS = ("views", "forward", "loss", "backward", "optimiser", "waiting")


class Enough(Exception):
    """Ends our training loop when the measurement has what it needs."""


@dataclass
class Clock:
    """Wall and CPU seconds of this process and of the loader workers that have ended."""

    device: torch.device
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    began: tuple[float, float] = (0.0, 0.0)

    def start(self) -> None:
        self.began = self._now()

    def stop(self) -> None:
        wall, cpu = self._now()
        self.wall.append(wall - self.began[0])
        self.cpu.append(cpu - self.began[1])

    def _now(self) -> tuple[float, float]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        used = os.times()
        return time.perf_counter(), used.user + used.system + used.children_user + used.children_system

    def result(self) -> dict[str, Any]:
        """Return the cold epoch, and the median, range and CPU time of the others."""
        warm, cpu = sorted(self.wall[1:]), self.cpu[1:]
        return {
            "cold_seconds": self.wall[0],
            "seconds": statistics.median(warm),
            "seconds_min": warm[0],
            "seconds_max": warm[-1],
            "cpu_seconds": statistics.median(cpu),
            "rounds": len(warm),
        }


@dataclass
class Turns:
    """Times of both sides and of the convolutions, measured in turns.

    Attributes:
        ours: our epochs.
        baseline: those of the baseline.
        convolutions: seconds of our network's convolutions alone, in a step, before and after each warm epoch of ours.
        pytorch: the same with PyTorch's algorithms.
    """

    ours: Clock
    baseline: Clock
    convolutions: list[tuple[float, float]] = field(default_factory=list)
    pytorch: list[tuple[float, float]] = field(default_factory=list)

    def convolution_result(self, steps: int) -> dict[str, float]:
        """Return the seconds of the convolutions in an epoch of ``steps``, and their share of it: medians of the turns.

        The speed of a shared machine changes by the minute, so each epoch is compared with what was measured around it.
        """
        result = {}
        for name, measured in (("convolution", self.convolutions), ("pytorch_convolution", self.pytorch)):
            alone = [steps * statistics.mean(around) for around in measured]
            shares = [part / epoch for part, epoch in zip(alone, self.ours.wall[1:], strict=True)]
            result[f"{name}_seconds"] = statistics.median(alone)
            result[f"of_{name}s"] = statistics.median(shares)
        return result


def interleave(pair: Pair, context: Context, effort: Effort) -> Turns:
    """Train both in turns, an epoch each: one cold round, then ``effort.rounds`` more.

    After ``effort.case_seconds`` no further round begins, but one warm round is always measured.
    """
    begin = time.perf_counter()
    turns = Turns(Clock(context.device), Clock(context.device))
    repeats = 1 if effort is QUICK else 3
    convolutions: Convolutions | None = None
    before = (0.0, 0.0)

    def alone(of: Convolutions) -> tuple[float, float]:
        return of.seconds(repeats), of.seconds(repeats, pytorch=True)

    # A run keeps its freed memory; the baseline uses the default allocator.
    memory = contextlib.ExitStack()

    def other_side(epoch: int, last: bool) -> dict[str, float]:
        nonlocal convolutions, before
        turns.ours.stop()
        if convolutions is None:
            convolutions = convolutions_of_step(pair.ours, context)
        else:
            after = alone(convolutions)
            turns.convolutions.append((before[0], after[0]))
            turns.pytorch.append((before[1], after[1]))
        memory.close()
        turns.baseline.start()
        pair.baseline.epoch(len(turns.baseline.wall))
        turns.baseline.stop()
        spent, done = time.perf_counter() - begin, len(turns.baseline.wall)
        if done > effort.rounds or (done > 1 and spent * (done + 1) / done > effort.case_seconds):
            raise Enough
        memory.enter_context(kept_memory())
        before = alone(convolutions)
        turns.ours.start()
        return {}

    # Instead of the evaluation of the stage: only training is timed.
    pair.ours.end_epoch = other_side  # type: ignore[method-assign]
    with contextlib.suppress(Enough), memory:
        memory.enter_context(kept_memory())
        turns.ours.start()
        train(pair.ours, context)
    return turns


def measure_learned(
    name: str, context: Context, images: Images, model: nn.Module | None, effort: Effort
) -> tuple[dict[str, Any], nn.Module]:
    """Check and time one learned stage; return the figures and our trained network."""
    device = context.device.type
    steps, size = (2, 16) if effort is QUICK else (3, 32)
    losses = compare_losses(lambda c: make_pair(name, c, images, model), context, steps, size)
    pair = make_pair(name, context, images, model)
    stage, theirs = pair.ours, pair.baseline
    batch = min(stage.training.batch_size, stage.n_images)
    count = steps_per_epoch(stage.n_images, batch) * batch
    turns = interleave(pair, context, effort)
    views = images.splits.train.size
    flops = training_flops(theirs, views) * count
    result: dict[str, Any] = {
        "stage": name,
        "images": count,
        "batch_size": batch,
        "flops": flops,
        "losses": losses,
        "loss_difference": largest_difference(losses),
    }
    for side, clock, dtype in (("ours", turns.ours, context.precision), ("baseline", turns.baseline, torch.float32)):
        entry = clock.result()
        entry["precision"] = str(dtype).removeprefix("torch.")
        entry["images_per_second"] = count / entry["seconds"]
        rates = measure_ceilings(device, quick=effort is QUICK)
        peak = rates.get(f"tiles_{entry['precision']}", rates[f"gemm_{entry['precision']}"])
        entry["of_product_peak"] = flops / peak / entry["seconds"]
        entry["of_convolution_peak"] = flops / measure_convolution(device, dtype) / entry["seconds"]
        result[side] = entry
    result["ratio"] = result["baseline"]["seconds"] / result["ours"]["seconds"]
    steps = count // batch
    result["ours"] |= turns.convolution_result(steps)
    with kept_memory():
        parts = our_parts(stage, context, 3)
    parts["waiting"] = max(0.0, result["ours"]["seconds"] / steps - sum(parts.values()))
    result["ours"]["parts"] = parts
    result["baseline"]["parts"] = baseline_parts(theirs, 3)
    return result, stage.model


def measure_mining(context: Context, images: Images, model: nn.Module, effort: Effort) -> dict[str, Any]:
    """Time features and neighbours of all images, in turns."""
    config = context.config
    plain = baseline.ContrastiveModel(context.model_config).to(context.device)
    plain.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    if config.mining.features != "projection":
        raise ValueError(f"the baseline mines the projection, mining.features is {config.mining.features!r}")
    view = baseline_images.transform(context.plain_view, images.splits.mean, images.splits.std)
    train_split, test_split = context.clustered["train"], context.clustered["test"]
    parts = (
        (baseline_images.Single(len(train_split), images.train, view), config.mining.k),
        (baseline_images.Single(len(test_split), images.test, view), min(config.mining.test_k, len(test_split) - 1)),
    )
    ours, theirs = Clock(context.device), Clock(context.device)
    begin = time.perf_counter()
    for done in range(1 + effort.rounds):
        if done > 1 and time.perf_counter() - begin > effort.case_seconds:
            break
        with kept_memory():
            ours.start()
            run_mining(context, Handover())
            ours.stop()
        theirs.start()
        for dataset, k in parts:
            rows = baseline.features(plain, dataset, config.evaluation.batch_size, context.device, default_workers())
            baseline.mine(rows, k)
        theirs.stop()
    count = len(train_split) + len(test_split)
    result: dict[str, Any] = {"stage": "mining", "images": count, "ours": ours.result(), "baseline": theirs.result()}
    for side in ("ours", "baseline"):
        result[side]["images_per_second"] = count / result[side]["seconds"]
    return result | {"ratio": result["baseline"]["seconds"] / result["ours"]["seconds"]}


def measure(
    config: Config,
    images: Images,
    opened: float,
    device: str,
    effort: Effort,
    stages: Sequence[str],
    file: Path | None = None,
) -> dict[str, Any]:
    """Measure the stages in order, each from what the former learned; ``effort.case_seconds`` is for each.

    ``file`` gets the result after every stage, so that an interruption loses one stage at most.
    """
    entries: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "benchmark": "end_to_end",
        "title": "Stages of a run",
        "device": device,
        "quick": effort is QUICK,
        "images": images.what,
        "open_seconds": opened,
        "workers": default_workers(),
        "config": config.model_dump(mode="json"),
        "stages": entries,
    }
    with tempfile.TemporaryDirectory() as temporary:
        run = RunFolder.open(Path(temporary) / "run", config)
        with run:
            context = open_context(config, run, Tracker(run, quiet=True), images.splits)
            result["environment"] = describe(device)
            result["ceilings"] = measure_ceilings(device, quick=effort is QUICK)
            model: nn.Module | None = None
            for name in stages:
                if name == "mining":
                    assert model is not None
                    run.write(PRETEXT_MODEL, StageResult(model.state_dict()))
                    run.finish_stage("pretext", 0.0, {}, config.seed)
                    entry = measure_mining(context, images, model, effort)
                else:
                    entry, model = measure_learned(name, context, images, model, effort)
                entries.append(entry)
                print(describe_stage(entry), flush=True)
                if file is not None:
                    write_json(file, result)
    return result


def describe_stage(entry: dict[str, Any]) -> str:
    """Return the lines of one stage for the terminal."""
    lines = [f"\n{entry['stage']}, {entry['images']:,} images an epoch"]
    for side in ("ours", "baseline"):
        r = entry[side]
        line = f"  {side:<9}{r['seconds']:9.2f} s  cold {r['cold_seconds']:8.2f} s  CPU {r['cpu_seconds']:8.2f} s"
        line += f"  {r['images_per_second']:9,.0f} images/s"
        if "of_product_peak" in r:
            line += f"  {r['of_product_peak']:.0%} of product, {r['of_convolution_peak']:.0%} of convolution peak"
            if "of_convolutions" in r:
                line += f", {r['of_convolutions']:.0%} of convolutions, {r['of_pytorch_convolutions']:.0%} of PyTorch's"
            line += f" ({r['precision']})"
        lines.append(line)
        if "parts" in r:
            lines.append("    a step: " + "  ".join(f"{p} {human_seconds(r['parts'].get(p, 0.0))}" for p in PARTS))
    lines.append(f"  {entry['ratio']:.2f} x the baseline")
    if "losses" in entry:
        shown = ", ".join(f"{a:.5f}/{b:.5f}" for a, b in entry["losses"])
        lines.append(f"  float32 losses on the same views, ours/baseline: {shown}; differ by {_worst(entry):.1e}")
    return "\n".join(lines)


def _worst(entry: dict[str, Any]) -> float:
    return float(entry["loss_difference"])


def settings(name: str, device: str, overrides: Sequence[str]) -> Config:
    """Return the configuration of both sides: the preset ``paper`` in the automatic dtype, without evaluation."""
    file = find_config(name)
    changes = {
        "preset": "paper",
        "precision": "auto",  # that of the preset is float32
        "runtime.device": device,
        "runtime.checkpoint_seconds": 1e9,
        "evaluation.baselines": False,
    }
    config = load_config(file, overrides, changes)
    if config.selflabel is not None and not any(word.startswith("selflabel.threshold=") for word in overrides):
        # After so few epochs no prediction is 99 % confident, and a step without a confident image trains nothing.
        wanted = config.clustering.n_clusters
        threshold = 1.2 / (wanted if isinstance(wanted, int) else 10)
        changed = config.selflabel.model_copy(update={"threshold": threshold})
        config = config.model_copy(update={"selflabel": changed})
    return config


def run(
    config: Config,
    device: str,
    effort: Effort,
    folder: Path | None,
    limit: int | None,
    stages: Sequence[str],
    file: Path | None = None,
) -> dict[str, Any]:
    """Open or make the images and measure the stages and the search."""
    with tempfile.TemporaryDirectory() as temporary:
        if folder is None and config.data.source not in ("digits",):
            folder = write_images(Path(temporary), limit or SYNTHETIC_IMAGES)
        begin = time.perf_counter()
        images = open_images(config, folder, limit)
        opened = time.perf_counter() - begin
        print(f"{config.name}, {config.preset}, {device}, {images.what}, opened in {opened:.2f} s")
        return measure(config, images, opened, device, effort, stages, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", default="cifar10", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="image files, in class folders or not")
    parser.add_argument("--images", type=int, help="take this many of them only")
    parser.add_argument("--rounds", type=int, default=4, help="warm epochs of each side at most (default: 4)")
    parser.add_argument("--budget", type=float, default=2000, help="seconds for all stages (default: 2000)")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage to measure")
    parser.add_argument("--quick", action="store_true", help="one warm epoch: a rehearsal, not a result")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    config = settings(options.config, options.device, options.overrides)
    effort = QUICK if options.quick else Effort(options.rounds, case_seconds=options.budget / (len(STAGES) + 1))
    stages = STAGES[: STAGES.index(options.until) + 1]
    result = run(config, options.device, effort, options.data, options.images, stages, options.json)
    print()
    size = neighbors.FAMILY.quick_sizes[-1] if options.quick else SEARCH_SIZE
    search = run_family(neighbors.FAMILY, options.device, [size], effort, ["scan-fast", "faiss IndexFlatIP"])
    result["search"] = search["cases"][0]
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    main()
