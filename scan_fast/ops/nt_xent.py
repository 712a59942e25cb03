"""NT-Xent operator: argument checks, fake kernels, autograd, and the loss over several processes.

Under ``torch.set_float32_matmul_precision("medium")`` the kernels round the operands of their matrix products to 16
bits if the CPU or GPU has fast products for them. Sums and exponentials stay in float32. In the newer API,
``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` has this effect on a CPU; CUDA has no equivalent. On a GPU,
16-bit embeddings always use 16-bit operands, which lose nothing, and float32 embeddings are otherwise split into two
16-bit parts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, native, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def nt_xent(z0: Tensor, z1: Tensor, temperature: float, *, anchors: str, reduction: str, impl: str) -> Tensor:
    """See :func:`scan_fast.nt_xent`."""
    both = _check(z0, z1, temperature, anchors)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    if dispatch.use_native(impl, z0, "nt_xent_forward"):
        result: Tensor = _NTXent.apply(z0, z1, float(temperature), both, reduction)
        return result
    losses = reference.nt_xent(z0, z1, float(temperature), both)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def nt_xent_distributed(z0: Tensor, z1: Tensor, temperature: float, *, anchors: str, impl: str) -> Tensor:
    """Compute the mean loss of this rank's anchors against the rows of all ranks; see :class:`scan_fast.NTXentLoss`.

    The gradient is that of the sum of all ranks' losses. Communication per step: four integers and the embeddings in
    the forward pass and, with the compiled kernels, three numbers per anchor in the backward pass. On a GPU the host
    waits for this only in the first call with a new shape. The kernels run only if every rank can use them; otherwise
    all ranks use the reference.

    Raises:
        ValueError: as :func:`scan_fast.nt_xent`, and if shapes or dtypes differ between ranks. On a GPU only the ranks
            whose shape is new to them raise.
    """
    both = _check(z0, z1, temperature, anchors)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return nt_xent(z0, z1, temperature, anchors=anchors, reduction="mean", impl=impl)
    with_kernel = dispatch.use_native(impl, z0, "nt_xent_forward")
    # A rank always sends its first answer, because not every rank reads it in every call.
    with_kernel = _local_choices.setdefault((dist.get_world_size(), impl, z0.dtype, z0.device), with_kernel)
    if _check_ranks_agree(z0, with_kernel, every_time=not z0.is_cuda):
        return _DistributedNTXent.apply(z0, z1, float(temperature), both).mean()
    n = z0.shape[0]
    views = _Gather.apply(torch.stack([z0, z1]))
    losses = reference.nt_xent(*_views_of_all_ranks(views), float(temperature), both)
    return losses.view(2 if both else 1, -1, n)[:, dist.get_rank()].mean()


def _check(z0: Tensor, z1: Tensor, temperature: float, anchors: str) -> bool:
    """Raise ValueError for wrong arguments; return whether all rows are anchors."""
    for name, z in (("z0", z0), ("z1", z1)):
        if not isinstance(z, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(z).__name__}")
        if z.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions (N, D), got shape {tuple(z.shape)}")
        if z.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {z.dtype}")
    if z0.shape != z1.shape:
        raise ValueError(f"z0 and z1 must have the same shape, got {tuple(z0.shape)} and {tuple(z1.shape)}")
    if z0.shape[0] < 1 or z0.shape[1] < 1:
        raise ValueError(f"z0 must have at least one row and one column, got shape {tuple(z0.shape)}")
    if z0.dtype != z1.dtype:
        raise ValueError(f"z0 and z1 must have the same dtype, got {z0.dtype} and {z1.dtype}")
    if z0.device != z1.device:
        raise ValueError(f"z0 and z1 must be on the same device, got {z0.device} and {z1.device}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise ValueError(f"temperature must be a number, got {temperature!r}")
    if not (math.isfinite(temperature) and temperature >= 1e-8):
        raise ValueError(f"temperature must be finite and at least 1e-8, got {temperature}")
    if anchors not in ("both", "first"):
        raise ValueError(f'anchors must be "both" or "first", got {anchors!r}')
    return anchors == "both"


# ---- the compiled operators --------------------------------------------------------------------------------------


if native.is_available():

    @torch.library.register_fake("scan_fast::nt_xent_forward")
    def _fake_forward(
        z0: Tensor, z1: Tensor, temperature: float, both_anchors: bool, sample_begin: int, sample_count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses = z0.new_empty((2 if both_anchors else 1) * sample_count, dtype=torch.float32)
        rows = 2 * z0.shape[0]
        unit = z0.new_empty((rows, z0.shape[1]), dtype=torch.float32)
        return losses, torch.empty_like(losses), unit, losses.new_empty(rows)

    @torch.library.register_fake("scan_fast::nt_xent_backward")
    def _fake_backward(
        grad_losses: Tensor,
        losses: Tensor,
        lse: Tensor,
        unit: Tensor,
        inv_norm: Tensor,
        temperature: float,
        both_anchors: bool,
        sample_begin: int,
        sample_count: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        grad_z0 = unit.new_empty((sample_count, unit.shape[-1]), dtype=dtype)
        return grad_z0, torch.empty_like(grad_z0)


class _NTXent(torch.autograd.Function):
    """Autograd of the loss. Saves only the results of the forward pass; the backward pass recomputes the similarities.

    Includes the reduction, so that the kernel receives one gradient instead of one per anchor.
    """

    @staticmethod
    def forward(ctx: Any, z0: Tensor, z1: Tensor, temperature: float, both: bool, reduction: str) -> Tensor:
        n = z0.shape[0]
        losses, lse, unit, inv_norm = torch.ops.scan_fast.nt_xent_forward(z0, z1, temperature, both, 0, n)
        ctx.save_for_backward(losses, lse, unit, inv_norm)
        ctx.temperature, ctx.both, ctx.samples, ctx.dtype = temperature, both, n, z0.dtype
        ctx.scale = 1 / losses.shape[0] if reduction == "mean" else 1.0
        return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        losses, lse, unit, inv_norm = ctx.saved_tensors
        grads = torch.ops.scan_fast.nt_xent_backward(
            (grad if ctx.scale == 1 else grad * ctx.scale).expand(losses.shape),
            losses,
            lse,
            unit,
            inv_norm,
            ctx.temperature,
            ctx.both,
            0,
            ctx.samples,
            ctx.dtype,
        )
        return grads[0], grads[1], None, None, None


# ---- several processes -------------------------------------------------------------------------------------------


def _all_gather(local: Tensor) -> Tensor:
    """Gather the tensors of all ranks: (world, *local.shape), by rank."""
    gathered = local.new_empty((dist.get_world_size(), *local.shape))
    dist.all_gather_into_tensor(gathered.flatten(), local.contiguous().flatten())
    return gathered


_local_choices: dict[tuple[object, ...], bool] = {}
"""The first choice of this process (kernel or reference), by number of ranks, impl, dtype and device."""
_common_choices: dict[tuple[object, ...], tuple[Tensor, bool]] = {}
"""Results of earlier comparisons between ranks: the description that was sent, on the device, and whether all ranks use
the kernel, by its key."""


def _check_ranks_agree(z: Tensor, with_kernel: bool, *, every_time: bool) -> bool:
    """Return whether all ranks use the kernel. Its collectives differ from those of the reference.

    Every call first sends a description of fixed length. Reading it makes the host wait for the device. So without
    ``every_time`` a rank reads it only for a shape that is new to it. If only some ranks have a new shape, those raise.

    Raises:
        ValueError: if shapes or dtypes differ between ranks; the gather would hang or exchange garbage.
    """
    key = (dist.get_world_size(), z.shape, z.dtype, z.device, with_kernel)
    known = _common_choices.get(key)
    if known is None:
        local = torch.tensor([*z.shape, _DTYPES.index(z.dtype), int(with_kernel)], device=z.device)
    else:
        local = known[0]
    gathered = _all_gather(local)
    if known is not None and not every_time:
        return known[1]
    described = gathered.tolist()
    if any(other[:3] != described[0][:3] for other in described):
        shapes = [f"({rows}, {columns}) {_DTYPES[dtype]}" for rows, columns, dtype, _ in described]
        raise ValueError(f"every rank must pass z0 and z1 of one shape and dtype, got by rank: {', '.join(shapes)}")
    all_take_it = all(other[3] for other in described)
    _common_choices[key] = local, all_take_it
    return all_take_it


def _views_of_all_ranks(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Split (world, 2, n, D) into the two views of all samples, (world * n, D) each, in order of rank."""
    return gathered[:, 0].flatten(0, 1), gathered[:, 1].flatten(0, 1)


class _DistributedNTXent(torch.autograd.Function):
    """Autograd of the losses of this rank's anchors against the rows of all ranks."""

    @staticmethod
    def forward(ctx: Any, z0: Tensor, z1: Tensor, temperature: float, both: bool) -> Tensor:
        n = z0.shape[0]
        all0, all1 = _views_of_all_ranks(_all_gather(torch.stack([z0, z1])))
        begin = dist.get_rank() * n
        losses, lse, unit, inv_norm = torch.ops.scan_fast.nt_xent_forward(all0, all1, temperature, both, begin, n)
        ctx.save_for_backward(losses, lse, unit, inv_norm)
        ctx.temperature, ctx.both, ctx.samples, ctx.dtype = temperature, both, n, z0.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None]:
        losses, lse, unit, inv_norm = ctx.saved_tensors
        n, views = ctx.samples, 2 if ctx.both else 1
        # (world, 3, views, n) -> per quantity the anchors of all samples: all first views, then all second views.
        gathered = _all_gather(torch.stack([grad_losses, losses, lse]).view(3, views, n)).permute(1, 2, 0, 3)
        grad_all, losses_all, lse_all = gathered.reshape(3, -1).unbind()
        begin = dist.get_rank() * n
        grads = torch.ops.scan_fast.nt_xent_backward(
            grad_all, losses_all, lse_all, unit, inv_norm, ctx.temperature, ctx.both, begin, n, ctx.dtype
        )
        return grads[0], grads[1], None, None


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return _all_gather(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
