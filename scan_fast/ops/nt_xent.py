"""NT-Xent operator: argument checks, fake kernels, autograd, and the loss over several processes.

Under ``torch.set_float32_matmul_precision("medium")`` the kernels round the operands of their matrix products to 16
bits if the CPU or GPU has fast products for them. Sums and exponentials stay in float32. In the newer API,
``torch.backends.mkldnn.matmul.fp32_precision = "bf16"`` has this effect on a CPU; CUDA has no equivalent. On a GPU,
16-bit embeddings always use 16-bit operands, which lose nothing, and float32 embeddings are otherwise split into two
16-bit parts.

A queue of further negatives needs no further kernels. The kernels handle some samples against the rows of all, as a
rank of a distributed run does. So the halves of the queue become the views of samples that nobody handles, and each
such row is a negative of all anchors. In the backward pass these samples' anchors have an upstream gradient, loss and
lse of 0, so each of their terms is an exponential of at most 1 times exactly 0, at all temperatures. The last row of an
odd queue has no partner; its term is added to the losses in plain PyTorch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, native, reference
from .collectives import all_gather, total

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float,
    *,
    anchors: str,
    queue: Tensor | None = None,
    reduction: str,
    impl: str,
) -> Tensor:
    """See :func:`scan_fast.nt_xent`."""
    both = _check(z0, z1, temperature, anchors, queue)
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
    queue = _constant(queue)
    if not dispatch.use_native(impl, z0, "nt_xent_forward", differentiable=True):
        return _reduce(reference.nt_xent(z0, z1, float(temperature), both, queue), reduction)
    pairs, single = _split(queue)
    if single is None:
        result: Tensor = _NTXent.apply(z0, z1, pairs, float(temperature), both, reduction)
        return result
    losses = _NTXent.apply(z0, z1, pairs, float(temperature), both, "none")
    return _reduce(_with_negative(losses, z0, z1, single, float(temperature), both), reduction)


def nt_xent_distributed(
    z0: Tensor, z1: Tensor, temperature: float, *, anchors: str, queue: Tensor | None = None, impl: str
) -> Tensor:
    """Compute the mean loss of this rank's anchors against the rows of all ranks; see :class:`scan_fast.NTXentLoss`.

    The gradient is that of the sum of all ranks' losses. Communication per step: five integers and the embeddings in
    the forward pass and, with the compiled kernels, three numbers per anchor in the backward pass. On a GPU the host
    waits for this only in the first call with a new shape. The kernels run only if every rank can use them; otherwise
    all ranks use the reference. The queue is not sent: every rank has the same one.

    Raises:
        ValueError: as :func:`scan_fast.nt_xent`, and if shapes or dtypes differ between ranks. On a GPU only the ranks
            whose shape is new to them raise.
    """
    both = _check(z0, z1, temperature, anchors, queue)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return nt_xent(z0, z1, temperature, anchors=anchors, queue=queue, reduction="mean", impl=impl)
    queue = _constant(queue)
    with_kernel = dispatch.use_native(impl, z0, "nt_xent_forward", differentiable=True)
    # A rank always sends its first answer, because not every rank reads it in every call.
    with_kernel = _local_choices.setdefault((dist.get_world_size(), impl, z0.dtype, z0.device), with_kernel)
    if _check_ranks_agree(z0, queue, with_kernel, every_time=not z0.is_cuda):
        pairs, single = _split(queue)
        losses: Tensor = _DistributedNTXent.apply(z0, z1, pairs, float(temperature), both)
        if single is not None:
            losses = _with_negative(losses, z0, z1, single, float(temperature), both)
        return losses.mean()
    n = z0.shape[0]
    views = _Gather.apply(torch.stack([z0, z1]))
    losses = reference.nt_xent(*_views_of_all_ranks(views), float(temperature), both, queue)
    return losses.view(2 if both else 1, -1, n)[:, dist.get_rank()].mean()


def _check(z0: Tensor, z1: Tensor, temperature: float, anchors: str, queue: Tensor | None) -> bool:
    """Raise ValueError for wrong arguments; return whether all rows are anchors."""
    named = (("z0", z0), ("z1", z1)) if queue is None else (("z0", z0), ("z1", z1), ("queue", queue))
    for name, z in named:
        if not isinstance(z, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(z).__name__}")
        if z.ndim != 2:
            shape = "(Q, D)" if name == "queue" else "(N, D)"
            raise ValueError(f"{name} must have 2 dimensions {shape}, got shape {tuple(z.shape)}")
        if z.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {z.dtype}")
    if z0.shape != z1.shape:
        raise ValueError(f"z0 and z1 must have the same shape, got {tuple(z0.shape)} and {tuple(z1.shape)}")
    if z0.shape[0] < 1 or z0.shape[1] < 1:
        raise ValueError(f"z0 must have at least one row and one column, got shape {tuple(z0.shape)}")
    if queue is not None and queue.shape[1] != z0.shape[1]:
        raise ValueError(
            f"queue must have {z0.shape[1]} columns as z0, got shape {tuple(queue.shape)} for z0 of {tuple(z0.shape)}"
        )
    for name, z in named[1:]:
        if z0.dtype != z.dtype:
            raise ValueError(f"z0 and {name} must have the same dtype, got {z0.dtype} and {z.dtype}")
        if z0.device != z.device:
            raise ValueError(f"z0 and {name} must be on the same device, got {z0.device} and {z.device}")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise ValueError(f"temperature must be a number, got {temperature!r}")
    # Comparisons, because torch.compile cannot trace math.isfinite of a number that it keeps symbolic.
    if not 1e-8 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 1e-8, got {temperature}")
    if anchors not in ("both", "first"):
        raise ValueError(f'anchors must be "both" or "first", got {anchors!r}')
    return anchors == "both"


def _reduce(losses: Tensor, reduction: str) -> Tensor:
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _constant(queue: Tensor | None) -> Tensor | None:
    """Return the queue without its gradient, None if it has no rows."""
    return None if queue is None or queue.shape[0] == 0 else queue.detach()


def _split(queue: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Return an even number of rows, None if there are no two, and the last of an odd number."""
    if queue is None or queue.shape[0] % 2 == 0:
        return queue, None
    return queue[:-1] if queue.shape[0] > 1 else None, queue[-1]


def _with_negative(losses: Tensor, z0: Tensor, z1: Tensor, row: Tensor, temperature: float, both: bool) -> Tensor:
    """Return the losses with one more negative of every anchor, a row (D,)."""
    with torch.autocast(z0.device.type, enabled=False):
        first, second, negative = (F.normalize(z.float(), dim=-1) for z in (z0, z1, row))
        anchors, positives = (first, second) if not both else (torch.cat(x) for x in ((first, second), (second, first)))
        excess = (anchors * (negative - positives)).sum(dim=1) / temperature
    return torch.logaddexp(losses, excess)


def _with_halves(z0: Tensor, z1: Tensor, pairs: Tensor | None) -> tuple[Tensor, Tensor]:
    """Append the halves of a queue to the two views."""
    if pairs is None:
        return z0, z1
    first, second = pairs.chunk(2)
    return torch.cat([z0, first]), torch.cat([z1, second])


def _with_zeros(values: Tensor, both: bool, samples: int) -> Tensor:
    """Append zeros to the anchors of each view, up to a number of samples."""
    per_view = values.view(2 if both else 1, -1)
    return F.pad(per_view, (0, samples - per_view.shape[1])).flatten()


# ---- the compiled operators --------------------------------------------------------------------------------------


if native.is_available():

    @torch.library.register_fake("scan_fast::nt_xent_forward")
    def _fake_forward(
        z0: Tensor, z1: Tensor, temperature: float, both_anchors: bool, sample_begin: int, sample_count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if z0.ndim != 2 or z0.shape != z1.shape:
            raise ValueError(f"z0 and z1 must have one shape (N, D), got {tuple(z0.shape)} and {tuple(z1.shape)}")
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
    def forward(
        ctx: Any, z0: Tensor, z1: Tensor, pairs: Tensor | None, temperature: float, both: bool, reduction: str
    ) -> Tensor:
        n = z0.shape[0]
        all0, all1 = _with_halves(z0, z1, pairs)
        losses, lse, unit, inv_norm = torch.ops.scan_fast.nt_xent_forward(all0, all1, temperature, both, 0, n)
        ctx.save_for_backward(losses, lse, unit, inv_norm)
        ctx.temperature, ctx.both, ctx.samples, ctx.dtype = temperature, both, n, z0.dtype
        ctx.scale, ctx.queued = 1 / losses.shape[0] if reduction == "mean" else 1.0, pairs is not None
        return _reduce(losses, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        losses, lse, unit, inv_norm = ctx.saved_tensors
        grad = (grad if ctx.scale == 1 else grad * ctx.scale).expand(losses.shape)
        if ctx.queued:
            samples = unit.shape[0] // 2
            grad, losses, lse = (_with_zeros(x.contiguous(), ctx.both, samples) for x in (grad, losses, lse))
        grads = torch.ops.scan_fast.nt_xent_backward(
            grad, losses, lse, unit, inv_norm, ctx.temperature, ctx.both, 0, ctx.samples, ctx.dtype
        )
        return grads[0], grads[1], None, None, None, None


# ---- several processes -------------------------------------------------------------------------------------------


_local_choices: dict[tuple[object, ...], bool] = {}
"""The first choice of this process (kernel or reference), by number of ranks, impl, dtype and device."""
_common_choices: dict[tuple[object, ...], tuple[Tensor, bool]] = {}
"""Results of earlier comparisons between ranks: the description that was sent, on the device, and whether all ranks use
the kernel, by its key."""


def _check_ranks_agree(z: Tensor, queue: Tensor | None, with_kernel: bool, *, every_time: bool) -> bool:
    """Return whether all ranks use the kernel. Its collectives differ from those of the reference.

    Every call first sends a description of fixed length. Reading it makes the host wait for the device. So without
    ``every_time`` a rank reads it only for a shape that is new to it. If only some ranks have a new shape, those raise.

    Raises:
        ValueError: if shapes or dtypes differ between ranks; the gather would hang or exchange garbage.
    """
    rows = 0 if queue is None else queue.shape[0]
    key = (dist.get_world_size(), z.shape, rows, z.dtype, z.device, with_kernel)
    known = _common_choices.get(key)
    if known is None:
        local = torch.tensor([*z.shape, _DTYPES.index(z.dtype), rows, int(with_kernel)], device=z.device)
    else:
        local = known[0]
    gathered = all_gather(local)
    if known is not None and not every_time:
        return known[1]
    described = gathered.tolist()
    if any(other[:3] != described[0][:3] for other in described):
        shapes = [f"({n}, {columns}) {_DTYPES[dtype]}" for n, columns, dtype, _, _ in described]
        raise ValueError(f"every rank must pass z0 and z1 of one shape and dtype, got by rank: {', '.join(shapes)}")
    if any(other[3] != rows for other in described):
        lengths = ", ".join(str(other[3]) for other in described)
        raise ValueError(f"every rank must pass the same queue, got rows by rank: {lengths}")
    all_take_it = all(other[4] for other in described)
    _common_choices[key] = local, all_take_it
    return all_take_it


def _views_of_all_ranks(gathered: Tensor) -> tuple[Tensor, Tensor]:
    """Split (world, 2, n, D) into the two views of all samples, (world * n, D) each, in order of rank."""
    return gathered[:, 0].flatten(0, 1), gathered[:, 1].flatten(0, 1)


class _DistributedNTXent(torch.autograd.Function):
    """Autograd of the losses of this rank's anchors against the rows of all ranks and of a queue."""

    @staticmethod
    def forward(ctx: Any, z0: Tensor, z1: Tensor, pairs: Tensor | None, temperature: float, both: bool) -> Tensor:
        n = z0.shape[0]
        all0, all1 = _with_halves(*_views_of_all_ranks(all_gather(torch.stack([z0, z1]))), pairs)
        begin = dist.get_rank() * n
        losses, lse, unit, inv_norm = torch.ops.scan_fast.nt_xent_forward(all0, all1, temperature, both, begin, n)
        ctx.save_for_backward(losses, lse, unit, inv_norm)
        ctx.temperature, ctx.both, ctx.samples, ctx.dtype = temperature, both, n, z0.dtype
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        losses, lse, unit, inv_norm = ctx.saved_tensors
        n, views = ctx.samples, 2 if ctx.both else 1
        # (world, 3, views, n) -> per quantity the anchors of all samples: all first views, then all second views.
        gathered = all_gather(torch.stack([grad_losses, losses, lse]).view(3, views, n)).permute(1, 2, 0, 3)
        grad_all, losses_all, lse_all = (
            _with_zeros(values, ctx.both, unit.shape[0] // 2) for values in gathered.reshape(3, -1).unbind()
        )
        begin = dist.get_rank() * n
        grads = torch.ops.scan_fast.nt_xent_backward(
            grad_all, losses_all, lse_all, unit, inv_norm, ctx.temperature, ctx.both, begin, n, ctx.dtype
        )
        return grads[0], grads[1], None, None, None


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all ranks for this rank's rows."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        return all_gather(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return total(grad)[dist.get_rank()]
