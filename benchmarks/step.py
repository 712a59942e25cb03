"""Time of a SimCLR step, its parts, and the ways of running it: ``python -m benchmarks.step [--device cpu|cuda]``.

The settings are those of ``--config``; the images are random and placed as in a run. Every way (plain, as a CUDA graph,
through torch.compile, both) makes the same steps from the same weights. Measured over ``--steps`` steps after a warm-up
are the time per step, the views per second, the share of the product peak, and the time of the views, which are made in
between. A way that fails is listed with its reason. The profile lists the time of each kernel of the plain step (on a
CPU, of each operator). Use it before a long run to choose the ``runtime`` options.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from scan_fast.data.datasets import STATISTICS, Splits
from scan_fast.data.loader import epoch_batches
from scan_fast.data.sources import TensorSource
from scan_fast.models.heads import PretextModel
from scan_fast.random import stream_key
from scan_fast.runs.config import Config, find_config, load_config
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker
from scan_fast.stages.handover import Handover
from scan_fast.stages.pretext import Pretext, build_method
from scan_fast.training.compilation import compile_networks
from scan_fast.training.context import Context, open_context, seeded
from scan_fast.training.optimizers import build_optimizer, write_learning_rate
from scan_fast.training.process import kept_memory
from scan_fast.training.step import WARM_UP_STEPS, TrainingStep

from .ceilings import measure_ceilings
from .environment import describe
from .family import human_seconds
from .files import write_json
from .views import pictures

WAYS = {"plain": (), "graph": ("graph",), "compiled": ("compiled",), "compiled graph": ("compiled", "graph")}
LISTED = 30


class Steps:
    """Steps of the pretext stage, run in one way."""

    def __init__(self, context: Context, way: Sequence[str]) -> None:
        with seeded(context.config.seed, Pretext.name):
            model = context.place(PretextModel(context.model_config))
        self.context = context
        method = build_method(context, model)
        self.stage = Pretext(context, model, method, Handover())
        self.optimizer = build_optimizer(self.stage.parameters(), self.stage.training.optimizer)
        # At this rate nothing diverges in a few steps.
        write_learning_rate(self.optimizer, 1e-4)
        if "compiled" in way:
            compile_networks(self.stage.networks())
        self.failure = ""
        self.step = TrainingStep(
            self.stage, self.optimizer, context.autocast, capture="graph" in way, say=self._note_failure
        )
        key = stream_key(context.config.seed, Pretext.name)
        self._orders = cycle(list(epoch_batches(key, 0, self.stage.n_images, self.stage.training.batch_size)))
        self.stage.train_mode()

    def _note_failure(self, text: str) -> None:
        self.failure = text

    def make(self, count: int) -> tuple[list[float], list[float]]:
        """Make some steps and wait for each; return the seconds of the views and of the rest."""
        views, rest = [], []
        for indices in islice(self._orders, count):
            begin = self._now()
            batch = self.stage.batch(0, indices)
            middle = self._now()
            self.step(batch)
            views.append(middle - begin)
            rest.append(self._now() - middle)
        return views, rest

    def run(self, count: int) -> float:
        """Make some steps as training does, without waiting in between; return the seconds per step."""
        begin = self._now()
        for indices in islice(self._orders, count):
            self.step(self.stage.batch(0, indices))
        return (self._now() - begin) / count

    def _now(self) -> float:
        if self.context.device.type == "cuda":
            torch.cuda.synchronize(self.context.device)
        return time.perf_counter()


def measure_way(context: Context, way: Sequence[str], steps: int, flops: float, peak: float) -> dict[str, Any]:
    """Time one way after the first step, which compiles and chooses kernels, and a warm-up."""
    made = Steps(context, way)
    first = made.run(1)
    made.run(WARM_UP_STEPS + 2)
    seconds = statistics.median(made.run(steps) for _ in range(3))
    views, rest = made.make(steps)
    if made.failure:
        return {"failed": made.failure}
    batch = min(made.stage.training.batch_size, made.stage.n_images)
    return {
        "first_step_seconds": first,
        "seconds": seconds,
        "views_per_second": 2 * batch / seconds,
        "of_product_peak": flops / peak / seconds,
        "views_seconds": statistics.median(views),
        "step_seconds": statistics.median(rest),
    }


def training_flops(context: Context) -> float:
    """Count the flops of the convolutions and matrix products of a step's forward and backward pass."""
    steps = Steps(context, ())
    images = 2
    side = context.config.pretext.method.side(context.side)
    x = torch.randn(images, 3, side, side, device=context.device).contiguous(memory_format=torch.channels_last)
    with FlopCounterMode(display=False) as counter:
        steps.stage.model(x).sum().backward()
    return counter.get_total_flops() / images * 2 * min(steps.stage.training.batch_size, steps.stage.n_images)


def profiled(context: Context, steps: int) -> list[dict[str, Any]]:
    """Return the seconds per step of each kernel or operator of the plain step, the longest first."""
    made = Steps(context, ())
    made.run(WARM_UP_STEPS)
    on_gpu = context.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        made.run(steps)
    entries: Iterable[Any] = recorded.key_averages()
    found = [
        {
            "name": entry.key,
            "seconds": (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) * 1e-6 / steps,
            "calls": entry.count / steps,
        }
        for entry in entries
    ]
    return sorted(found, key=lambda entry: -entry["seconds"])[:LISTED]


def measure(
    config: Config,
    device: str,
    images: int,
    steps: int,
    quick: bool,
    ways: Sequence[str] = tuple(WAYS),
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Measure the named ways, as far as the device has them; ``save`` gets the result after each."""
    side = config.data.image_size or 32
    mean, std = STATISTICS.get(config.data.source, STATISTICS["imagenet"])
    train = TensorSource(pictures(images, side))
    splits = Splits(train, TensorSource(pictures(64, side)), None, config.data.mean or mean, config.data.std or std)
    result: dict[str, Any] = {
        "benchmark": "step",
        "title": "A SimCLR step",
        "device": device,
        "quick": quick,
        "environment": describe(device),
        "ceilings": measure_ceilings(device, quick=quick),
        "config": config.model_dump(mode="json"),
        "ways": {},
    }
    with tempfile.TemporaryDirectory() as temporary, kept_memory():
        run = RunFolder.open(Path(temporary) / "run", config)
        with run:
            context = open_context(config, run, Tracker(run, quiet=True), splits)
            precision = str(context.precision).removeprefix("torch.")
            rates = result["ceilings"]
            peak = rates.get(f"tiles_{precision}", rates[f"gemm_{precision}"])
            flops = training_flops(context)
            result |= {"precision": precision, "flops": flops}
            for name in ways:
                way = WAYS[name]
                if "graph" in way and device != "cuda":
                    continue
                try:
                    entry = measure_way(context, way, steps, flops, peak)
                except Exception as error:  # no compiler, or no memory: the other ways are still worth measuring
                    entry = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
                result["ways"][name] = entry
                print(describe_way(name, entry), flush=True)
                save(result)
            result["profile"] = profiled(context, max(1, steps // 4))
            save(result)
    return result


def describe_way(name: str, entry: dict[str, Any]) -> str:
    """Format the results of a way for the terminal."""
    if "failed" in entry:
        return f"  {name:<16} {entry['failed']}"
    return (
        f"  {name:<16} {human_seconds(entry['seconds']):>9} a step  {entry['views_per_second']:>10,.0f} views/s  "
        f"{entry['of_product_peak']:5.0%} of product peak  views {human_seconds(entry['views_seconds'])}, "
        f"rest {human_seconds(entry['step_seconds'])}  first step {human_seconds(entry['first_step_seconds'])}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--config", default="cifar10", help="a configuration file, or the name of a shipped one")
    parser.add_argument("--images", type=int, help="random images (default: 10,000 on a GPU, 1,024 on a CPU)")
    parser.add_argument("--steps", type=int, help="steps of a measurement (default: 20 on a GPU, 2 on a CPU)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    parser.add_argument("--quick", action="store_true", help="a rehearsal, not a result")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    on_gpu = options.device == "cuda"
    config = load_config(find_config(options.config), options.overrides, {"runtime.device": options.device})
    images = options.images or (10_000 if on_gpu else 1024)
    steps = options.steps or (20 if on_gpu else 2)

    def save(result: dict[str, Any]) -> None:
        if options.json:
            write_json(options.json, result)

    result = measure(config, options.device, images, steps, options.quick, options.ways, save)
    width = max(len(entry["name"][:80]) for entry in result["profile"])
    for entry in result["profile"]:
        print(f"  {entry['name'][:80]:<{width}} {human_seconds(entry['seconds']):>9}  {entry['calls']:6.1f} calls")


if __name__ == "__main__":
    main()
