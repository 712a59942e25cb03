"""Whether bfloat16 pays on a processor: its results and its time, compared with float32 on the network of the run."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.backbones import ModelConfig
from ..models.heads import PretextModel

TRIAL_SECONDS = 0.3
"""About the time of one float32 pass of a trial; the number of images follows from it."""
LEAST_GAIN = 1.15
"""How many times as fast bfloat16 has to be."""
OUTPUT_ERROR = 0.05
"""The largest relative error of the embeddings. Rounding alone gives about 0.01."""
GRADIENT_ERROR = 0.6
"""The largest relative error of any weight's gradient, for random images and a random direction, of which little adds
up: rounding alone gives 0.1 to 0.4 by depth; a wrong kernel gives 1 and more."""


@dataclass(frozen=True)
class Choice:
    """What ``precision: auto`` came to, and why, in words."""

    precision: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The number format of convolutions and matrix products."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def choose_on_cpu(config: ModelConfig, side: int, batch_size: int) -> Choice:
    """Try one training pass of the network in both formats.

    Asked again in the same process, the answer is the same: runs of one program agree.

    Args:
        config: the network; pretrained weights make no difference.
        side: the side of its images.
        batch_size: the images that go through it at once in training; a trial takes no more.
    """
    if not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return Choice("float32", "this processor has no bfloat16 products")
    return _try(config.model_copy(update={"pretrained": False}).model_dump_json(), side, batch_size)


@functools.cache
def _try(config: str, side: int, batch_size: int) -> Choice:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PretextModel(ModelConfig.model_validate_json(config)).to(memory_format=torch.channels_last).train()
        images = torch.randn(max(2, min(batch_size, 256)), 3, side, side)
        direction = torch.randn(len(images), model(images[:2]).shape[1])

    def run(count: int, dtype: torch.dtype) -> tuple[float, Tensor, list[Tensor]]:
        batch = images[:count].contiguous(memory_format=torch.channels_last)
        model.zero_grad(set_to_none=True)
        # Processor time: the machine may be busy with other things, more so in one format's turn than in the other's.
        begin = time.process_time()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            embedding = model(batch).float()
        (embedding * direction[:count]).sum().backward()
        seconds = time.process_time() - begin
        gradients = [p.grad for p in model.parameters() if p.grad is not None and p.ndim > 1]
        return seconds, embedding.detach(), gradients

    few = min(8, len(images))
    run(few, torch.float32)
    count = int(min(len(images), max(few, few * TRIAL_SECONDS / run(few, torch.float32)[0])))
    seconds: dict[torch.dtype, float] = {}
    run(count, torch.bfloat16)  # the first pass is for caches and for the choice of kernels
    for _ in range(2):
        for dtype in (torch.float32, torch.bfloat16):
            found = run(count, dtype)
            seconds[dtype] = min(seconds.get(dtype, float("inf")), found[0])
            if dtype == torch.float32:
                exact = found
    output = _error(found[1], exact[1])
    gradient = max(_error(a, b) for a, b in zip(found[2], exact[2], strict=True))
    gain = seconds[torch.float32] / seconds[torch.bfloat16]
    if not (output < OUTPUT_ERROR and gradient < GRADIENT_ERROR):
        return Choice(
            "float32", f"bfloat16 is wrong here: relative error {output:.2g} forward, {gradient:.2g} backward"
        )
    if gain < LEAST_GAIN:
        return Choice("float32", f"bfloat16 is only {gain:.2f} times as fast here, in processor time")
    return Choice("bfloat16", f"{gain:.1f} times as fast as float32 here, relative error {output:.1g}")


def _error(value: Tensor, exact: Tensor) -> float:
    """Relative, in the Euclidean norm; NaN stays NaN, which is below no bound."""
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))
