"""Distances of a batch from the standard normal distribution: argument checks, a fast form, and several processes.

There is no compiled kernel for them, because it would not pay. With 256 directions, in a step of 256 images and a
ResNet-18 of a quarter of the width, SIGReg takes 0.20 % of the time and VISReg 0.27 % (``python -m
benchmarks.gaussian``; ``benchmarks/results/cpu-gaussian.json``).

The characteristic function of SIGReg is wanted at odd multiples of one step h. With e = exp(i h x), the values are e,
e^3, e^5, ..., so one cosine and one sine per projection suffice, and each further point costs a product. The gradient
is a polynomial in e^2, which Horner's rule evaluates.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from . import reference
from .collectives import gather_numbers, rows_of_all_ranks, several_ranks, sum_over_ranks

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def sigreg(z: Tensor, directions: Tensor, *, gather_distributed: bool, even: bool = False) -> Tensor:
    """See :func:`scan_fast.losses.sigreg_loss`.

    With ``even`` the caller promises that all ranks have as many rows and the same directions. Their numbers are not
    compared, so the host does not wait for the device.
    """
    z, directions, counts = _prepared(z, directions, gather_distributed, even)
    with torch.autocast(z.device.type, enabled=False):
        # Of an integer that torch.func.jvp and dual_level() raise from -1: the fast form has no forward derivatives.
        if counts is None and forward_ad._current_level >= 0:
            return reference.sigreg(z, directions)
        sums = _Waves.apply(z @ directions.T)
        if counts is not None:
            sums = sum_over_ranks(sums)
        return reference.sigreg_of_means(*(sums / (len(z) if counts is None else sum(counts))).unbind(1))


def visreg(z: Tensor, directions: Tensor, *, gather_distributed: bool, even: bool = False) -> Tensor:
    """See :func:`scan_fast.losses.visreg_loss`, and :func:`sigreg` for ``even``.

    Each rank sorts the projections on its share of the directions.
    """
    z, directions, counts = _prepared(z, directions, gather_distributed, even)
    with torch.autocast(z.device.type, enabled=False):
        if counts is None:
            return reference.visreg(z, directions)
        own = directions[dist.get_rank() :: dist.get_world_size()]
        centre, scale, shapes = reference.visreg_terms(rows_of_all_ranks(z, counts), own)
        return centre + scale + sum_over_ranks(shapes.sum()) / len(directions)


def _prepared(
    z: Tensor, directions: Tensor, gather_distributed: bool, even: bool
) -> tuple[Tensor, Tensor, list[int] | None]:
    """Check the arguments and return them in the dtype of the computation, with the rows of each rank or None."""
    for name, x, shape in (("z", z, "(B, D)"), ("directions", directions, "(K, D)")):
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions {shape}, got shape {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if z.shape[1] < 1:
        raise ValueError(f"z must have at least one column, got shape {tuple(z.shape)}")
    if directions.shape[0] < 1 or directions.shape[1] != z.shape[1]:
        raise ValueError(
            f"directions must have at least one row and {z.shape[1]} columns as z, got shape {tuple(directions.shape)}"
        )
    if z.device != directions.device:
        raise ValueError(f"z and directions must be on the same device, got {z.device} and {directions.device}")
    counts = None
    if gather_distributed and several_ranks():
        counts = [len(z)] * dist.get_world_size() if even else _rows_by_rank(z, directions)
    if (len(z) if counts is None else sum(counts)) < 2:
        raise ValueError(f"z must have at least two rows, which form a distribution, got shape {tuple(z.shape)}")
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    directions = F.normalize(directions.detach().to(dtype), dim=1)
    if counts is not None and not even:
        directions = directions.contiguous().clone()
        dist.broadcast(directions, src=0)
    return z.to(dtype), directions, counts


def _rows_by_rank(z: Tensor, directions: Tensor) -> list[int]:
    described = gather_numbers([len(z), z.shape[1], len(directions), _DTYPES.index(z.dtype)], z.device)
    if any(other[1:] != described[0][1:] for other in described):
        got = [f"({n}, {d}) {_DTYPES[dtype]}, {k} directions" for n, d, k, dtype in described]
        raise ValueError(f"every rank must pass z of one width and dtype, and as many directions; got {'; '.join(got)}")
    return [n for n, *_ in described]


class _Waves(torch.autograd.Function):
    """Sums over the rows of cosines and sines of projections (B, K) at the points of SIGReg: (points, 2, K)."""

    @staticmethod
    def forward(ctx: Any, projections: Tensor) -> Tensor:
        first, *more = reference.SIGREG_POINTS
        wave = torch.polar(torch.ones_like(projections), projections * first)
        square = wave * wave
        ctx.save_for_backward(wave, square)
        sums = [wave.sum(dim=0)]
        for _ in more:
            wave = wave * square
            sums.append(wave.sum(dim=0))
        return torch.view_as_real(torch.stack(sums)).movedim(-1, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        wave, square = ctx.saved_tensors
        points = grad.new_tensor(reference.SIGREG_POINTS)[:, None]
        # The derivative of g cos(t x) + h sin(t x) is the real part of t (h + i g) exp(i t x).
        *lower, last = torch.complex(points * grad[:, 1], points * grad[:, 0])
        total = last * square
        for factor in lower[:0:-1]:
            total.add_(factor).mul_(square)
        return total.add_(lower[0]).mul_(wave).real
