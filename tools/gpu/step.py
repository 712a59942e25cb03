"""A SimCLR step on CIFAR-10's shapes, in each way of carrying it out: ``python -m tools.gpu.step``.

ResNet-18 for 32-pixel images, bfloat16 autocast, channels last, SGD; views by the augment kernel from images on the
device. The ways: PyTorch's layers and loss; our batch normalisation and NT-Xent; the same as one CUDA graph; the same
through torch.compile. The profile lists the time that the second way spends in each kernel. It needs torch alone;
``benchmarks.step`` times the step of the driver. One JSON object per way.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import scan_fast
from benchmarks.augment import draw, views
from scan_fast.ops import dispatch, reference
from scan_fast.ops.batch_norm import batch_norm

from .process import SETS, emit, kernel_set, prefer

SIDE, LISTED = 32, 30
FAMILIES = {"augment", "batch_norm", "nt_xent"}
"""Families whose kernels the step uses."""


class Norm(nn.BatchNorm2d):
    """Batch normalisation, a residual and ReLU: our operator, or PyTorch's three."""

    impl: dispatch.Impl = "reference"

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
        tensors = (self.weight, self.bias, self.running_mean, self.running_var)
        return batch_norm(x, *tensors, residual=residual, relu=relu, training=True, impl=self.impl)


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = Norm(outputs), Norm(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if stride > 1 or inputs != outputs else None
        self.norm3 = Norm(outputs) if self.shortcut is not None else None

    def forward(self, x: Tensor) -> Tensor:
        short = x
        if self.shortcut is not None and self.norm3 is not None:
            short = self.norm3(self.shortcut(x), relu=False)
        return self.norm2(self.conv2(self.norm1(self.conv1(x))), short)


class Network(nn.Module):
    """A ResNet for small images, and a projection to 128 dimensions.

    Args:
        channels: of the blocks at each resolution, the first at full; ResNet-18 has (64, 128, 256, 512).
        blocks: at each resolution; ResNet-18 has 2.
    """

    def __init__(self, channels: Sequence[int], blocks: int) -> None:
        super().__init__()
        width, last = channels[0], channels[-1]
        self.stem, self.norm = nn.Conv2d(3, width, 3, 1, 1, bias=False), Norm(width)
        pairs = itertools.pairwise((width, *channels))
        self.blocks = nn.Sequential(
            *(
                Block(inputs if j == 0 else outputs, outputs, 2 if i > 0 and j == 0 else 1)
                for i, (inputs, outputs) in enumerate(pairs)
                for j in range(blocks)
            )
        )
        self.head = nn.Sequential(nn.Linear(last, last), nn.ReLU(), nn.Linear(last, 128))

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem(x)))
        return self.head(x.mean(dim=(2, 3)))


class Step:
    """A network and its optimiser, with one way of making a step."""

    def __init__(
        self,
        device: str,
        batch: int,
        channels: Sequence[int],
        blocks: int,
        *,
        ours: bool,
        compiled: bool,
        captured: bool,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.batch, self.ours = device, batch, ours
        self.network = Network(channels, blocks).to(device).to(memory_format=torch.channels_last)
        for module in self.network.modules():
            if isinstance(module, Norm):
                module.impl = "native" if ours else "reference"
        self.forward = torch.compile(self.network, dynamic=False) if compiled else self.network
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1e-4, momentum=0.9, fused=True)
        images, self.recipes = draw(2 * batch, SIDE, SIDE, 0)
        self.images = images.to(device)
        self.x = self.make_views()
        self.run: Callable[[], Any] = self.update
        if captured:
            self.run = self.capture()

    def make_views(self) -> Tensor:
        """Return the views of a batch, (2 batch, 3, side, side), channels last."""
        return views(self.images, self.recipes, SIDE).contiguous(memory_format=torch.channels_last)

    def update(self) -> Tensor:
        """Train on the current views; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            z = self.forward(self.x)
        z0, z1 = z.float().chunk(2)
        if self.ours:
            loss = scan_fast.nt_xent(z0, z1, 0.1, impl="native")
        else:
            loss = reference.nt_xent(z0, z1, 0.1, True).mean()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def capture(self) -> Callable[[], Any]:
        """Record the update as a CUDA graph."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.update()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.update()
        return graph.replay

    def make(self, count: int) -> float:
        """Make some steps with their views; return the seconds per step."""
        self.wait()
        begin = time.perf_counter()
        for _ in range(count):
            self.x.copy_(self.make_views())
            self.run()
        self.wait()
        return (time.perf_counter() - begin) / count

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()


WAYS: dict[str, dict[str, bool]] = {
    "PyTorch": {"ours": False, "compiled": False, "captured": False},
    "ours": {"ours": True, "compiled": False, "captured": False},
    "ours, captured": {"ours": True, "compiled": False, "captured": True},
    "ours, compiled": {"ours": True, "compiled": True, "captured": False},
    "PyTorch, compiled": {"ours": False, "compiled": True, "captured": False},
}


def profiled(step: Step, count: int) -> list[dict[str, Any]]:
    """Return the seconds per step of each kernel (on a CPU, of each operator), the longest first."""
    on_gpu = step.device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as recorded:
        step.make(count)
    entries: list[Any] = list(recorded.key_averages())
    found = [
        {
            "name": entry.key[:120],
            "seconds": (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total) * 1e-6 / count,
            "calls": entry.count / count,
        }
        for entry in entries
    ]
    return sorted(found, key=lambda entry: -float(entry["seconds"]))[:LISTED]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.step", description=__doc__)
    parser.add_argument("--stage", default="step")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--sets", nargs="+", type=kernel_set, default=list(SETS), metavar="FAMILY:KERNELS")
    parser.add_argument("--quick", action="store_true", help="a rehearsal, not a result")
    parser.add_argument("--seconds", type=float, default=45.0, help="no way begins later than this")
    parser.add_argument("--compile", action="store_true", help="only fill the cache of torch.compile")
    options = parser.parse_args()
    begin = time.perf_counter()
    steps = 2 if options.quick else 20
    batch, channels, blocks = (8, (4, 8), 1) if options.quick else (512, (64, 128, 256, 512), 2)
    about = {"stage": options.stage}
    if FAMILIES.isdisjoint(family for family, _ in options.sets):
        emit({"note": f"none of the kernels of a step: {', '.join(sorted(FAMILIES))}", **about})
        return
    for family, kernels in options.sets:  # those for sm_90a come last
        prefer(family, kernels)
    if options.device == "cuda":
        torch.backends.cudnn.benchmark = True
    for name, way in WAYS.items():
        if options.compile:
            if way["compiled"]:
                Step(options.device, batch, channels, blocks, **way).make(1)
                emit({"compiled": name, **about})
            continue
        if time.perf_counter() - begin > options.seconds:
            raise SystemExit(f"the time is up before {name!r}")
        if way["captured"] and options.device == "cpu":
            emit({"way": name, "skipped": "a CPU has no graphs", **about})
            continue
        emit({"begin": name, **about})
        try:
            first = time.perf_counter()
            step = Step(options.device, batch, channels, blocks, **way)
            step.make(1)
            first = time.perf_counter() - first
            step.make(3)
            seconds = statistics.median(step.make(steps) for _ in range(3))
            emit({"way": name, "seconds": seconds, "views_per_second": 2 * batch / seconds, "first": first, **about})
            if name == "ours":
                emit({"profile": profiled(step, steps), **about})
        except Exception as error:  # no compiler, or no memory: the other ways are still worth measuring
            message = (str(error).splitlines() or [""])[0][:200]
            emit({"way": name, "failed": f"{type(error).__name__}: {message}", **about})
    if not options.compile:
        emit({"done": True, **about})


if __name__ == "__main__":
    main()
