"""The compute dtype of a run on a processor: bfloat16 if the processor multiplies in it and the results are right.

The choice depends on the processor's instructions, on the network and on the libraries, never on a measured time: two
runs of one configuration on one machine choose alike. If there are bfloat16 products, they are faster than
float32, with AVX-512-BF16 and more so with AMX.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.backbones import ModelConfig, build_backbone
from ..models.heads import PretextModel

TRIAL_IMAGES = 16
"""Number of images on which both dtypes are compared."""
OUTPUT_ERROR = 0.05
"""The largest relative error of the embeddings. Rounding alone gives about 0.01."""
GRADIENT_ERROR = 0.6
"""The largest relative error of any weight's gradient, for random images and a random direction, of which little adds
up: rounding alone gives 0.1 to 0.4 by depth; a wrong kernel gives 1 and more."""


@dataclass(frozen=True)
class Choice:
    """The dtype that ``precision: auto`` resolves to, and the reason in words."""

    precision: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of convolutions and matrix products."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def choose_on_cpu(config: ModelConfig, side: int, *, trains: bool = True) -> Choice:
    """Compare one pass of the network in bfloat16 with float32, if the processor has bfloat16 products.

    Args:
        config: the network.
        side: the side of its images in pixels.
        trains: compare a training pass with random weights; otherwise a pass forward with the weights of ``config``.
    """
    if torch.cpu._is_amx_tile_supported():
        unit = "AMX"
    elif torch.cpu._is_avx512_bf16_supported():
        unit = "AVX-512-BF16"
    else:
        return Choice("float32", "this processor has no bfloat16 products")
    if not trains:
        error = _forward_error(config.model_dump_json(), side)
        if not error < OUTPUT_ERROR:
            return Choice("float32", f"bfloat16 is wrong here: relative error {error:.2g} of the features")
        return Choice("bfloat16", f"this processor has {unit}; relative error {error:.1g} of the features")
    output, gradient = _errors(config.from_scratch().model_dump_json(), side)
    if not (output < OUTPUT_ERROR and gradient < GRADIENT_ERROR):
        return Choice(
            "float32", f"bfloat16 is wrong here: relative error {output:.2g} forward, {gradient:.2g} backward"
        )
    return Choice("bfloat16", f"this processor has {unit}; relative error {output:.1g}")


@functools.cache
def _errors(config: str, side: int) -> tuple[float, float]:
    """Return the relative errors of bfloat16: of the embeddings, and the largest of any weight's gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PretextModel(ModelConfig.model_validate_json(config)).to(memory_format=torch.channels_last).train()
        images = torch.randn(TRIAL_IMAGES, 3, side, side).contiguous(memory_format=torch.channels_last)
        direction = torch.randn(TRIAL_IMAGES, model(images[:2]).shape[1])

    @torch.enable_grad()
    def run(dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad(set_to_none=True)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            embedding = model(images).float()
        (embedding * direction).sum().backward()
        return embedding.detach(), [p.grad for p in model.parameters() if p.grad is not None and p.ndim > 1]

    exact, found = run(torch.float32), run(torch.bfloat16)
    return _error(found[0], exact[0]), max(_error(a, b) for a, b in zip(found[1], exact[1], strict=True))


@functools.cache
@torch.no_grad()
def _forward_error(config: str, side: int) -> float:
    """Return the relative error of the features in bfloat16, with the weights that the configuration names."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_backbone(ModelConfig.model_validate_json(config)).to(memory_format=torch.channels_last).eval()
        # Smooth images: noise in every pixel is nothing that the weights have learned.
        coarse = torch.randn(TRIAL_IMAGES, 3, 8, 8)
    images = F.interpolate(coarse, (side, side), mode="bicubic").contiguous(memory_format=torch.channels_last)
    exact = model(images).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(images).float()
    return _error(found, exact)


def _error(value: Tensor, exact: Tensor) -> float:
    """Return the relative error in the Euclidean norm. NaN stays NaN, which is below no bound."""
    return float((value - exact).norm() / exact.norm().clamp_min(1e-30))
