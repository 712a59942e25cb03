"""Self-test of NT-Xent."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from .comparison import FLOATS, Finding, Slack, Tensors, compared, generator, normal, poison, uniform, with_gradients

# 16-bit inputs are multiplied in 16 bits, which plain PyTorch multiplies in float32. Errors of matrix units grow by
# 1 / temperature; the fast exp2 errs by two units.
SLACK = Slack(reduced=8, gpu=64)
_BLOCK = 64  # rows of a tile of any kernel are a multiple of it


def findings(device: torch.device) -> Iterator[Finding]:
    """Compare losses and gradients with the reference."""
    # Rows, dimensions, temperature, anchors of both views, the rows of this rank, dtypes. The temperature of 0.02 takes
    # sums with a moving maximum, 260 dimensions the kernels for wide rows, 200 the largest panels of 16-bit rows.
    cases = (
        (3, 5, 0.1, True, (0, 3), FLOATS),
        (65, 33, 0.02, True, (0, 65), FLOATS[:2]),
        (130, 128, 0.1, True, (0, 130), FLOATS[:2]),
        (100, 64, 0.1, False, (40, 50), FLOATS[:2]),
        (70, 200, 0.1, True, (0, 70), FLOATS[1:2]),
        (67, 260, 0.1, True, (0, 67), FLOATS[::2]),
    )
    for rows, dim, temperature, both, (begin, count), dtypes in cases:
        g = generator()
        z0 = normal(g, rows, dim)
        cpu = (z0, z0 + normal(g, rows, dim), 1 + uniform(g, (2 if both else 1) * rows))
        kernel, plain = (make(temperature, both, begin, count) for make in (_kernel, _plain))
        for dtype in dtypes:
            yield compared(f"{rows}x{dim} at {temperature}", dtype, device, kernel, plain, cpu, SLACK)
    # A queue: samples behind those that are handled, whose anchors have zeros for gradient, loss and lse.
    for both, temperature in ((False, 0.2), (True, 0.02)):
        g = generator()
        z0, handled = normal(g, 150, 64), 40
        cpu = (z0, z0 + normal(g, 150, 64), 1 + uniform(g, (2 if both else 1) * handled))
        kernel, plain = (make(temperature, both, handled) for make in (_queued_kernel, _queued_plain))
        for dtype in FLOATS[:2]:
            case = f"40x64 and a queue of 220 at {temperature}"
            yield compared(case, dtype, device, kernel, plain, cpu, SLACK)
    yield from _long(device)


def _kernel(temperature: float, both: bool, begin: int, count: int) -> Callable[..., Tensors]:
    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        ops, n = torch.ops.scan_fast, z0.shape[0]
        losses, lse, unit, inv_norm = ops.nt_xent_forward(z0, z1, temperature, both, 0, n)
        local = losses
        if count < n:
            local = ops.nt_xent_forward(z0, z1, temperature, both, begin, count)[0]
        grads = ops.nt_xent_backward(upstream, losses, lse, unit, inv_norm, temperature, both, begin, count, z0.dtype)
        return (local, *grads)

    return call


def _plain(temperature: float, both: bool, begin: int, count: int) -> Callable[..., Tensors]:
    rows = slice(begin, begin + count)

    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        losses, *grads = with_gradients(lambda a, b: reference.nt_xent(a, b, temperature, both), (z0, z1), upstream)
        return (losses.view(-1, z0.shape[0])[:, rows].flatten(), *(grad[rows] for grad in grads))

    return call


def _queued_kernel(temperature: float, both: bool, handled: int) -> Callable[..., Tensors]:
    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        ops, n = torch.ops.scan_fast, z0.shape[0]
        losses, lse, unit, inv_norm = ops.nt_xent_forward(z0, z1, temperature, both, 0, handled)
        padded = (F.pad(x.view(-1, handled), (0, n - handled)).flatten() for x in (upstream, losses, lse))
        return (losses, *ops.nt_xent_backward(*padded, unit, inv_norm, temperature, both, 0, handled, z0.dtype))

    return call


def _queued_plain(temperature: float, both: bool, handled: int) -> Callable[..., Tensors]:
    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        queue = torch.cat([z0[handled:], z1[handled:]])
        rows = (z0[:handled], z1[:handled])
        return with_gradients(lambda a, b: reference.nt_xent(a, b, temperature, both, queue), rows, upstream)

    return call


def _long(device: torch.device) -> Iterator[Finding]:
    """Run many tiles per multiprocessor: 3,072 samples, with the exact losses and gradients of 96 rows.

    Row r is near the unit vector of its block of 64, r // 64. So coordinate b of a row's gradient comes from block b
    almost alone: a tile that was left out, taken twice or swapped with another shows in full.
    """
    n, dim, temperature = 3072, 96, 0.5
    rows = 2 * n
    z = 0.25 / math.sqrt(dim) * (2 * uniform(generator(), rows, dim) - 1)
    every = torch.arange(rows, device="cpu")
    z[every, every // _BLOCK] += 1
    z = z.half()  # so that both dtypes below have the same values
    weights = 1 + (every % 7).float() / 8
    # One row of every block, at another place in each.
    some = torch.arange(rows // _BLOCK, device="cpu")
    some = some * _BLOCK + (37 * some) % _BLOCK
    u = z.double()
    length = u.norm(dim=1, keepdim=True)
    u /= length
    positive = (some + n) % rows
    logits = u[some] @ u.T / temperature
    logits[torch.arange(len(some), device="cpu"), some] = -math.inf
    total = logits.logsumexp(dim=1)
    partner = logits.gather(1, positive[:, None]).squeeze(1)
    all_positive = ((u[:n] * u[n:]).sum(dim=1) / temperature).repeat(2)
    g = weights.double()
    of_row = g[some, None] * (logits - total[:, None]).exp()

    for dtype, loss_allowed, allowed in ((torch.float32, 2.0**-16, 2.0**-8), (torch.float16, 2.0**-10, 2.0**-4)):
        ops = torch.ops.scan_fast
        there = z.to(device, dtype)
        poison(device, z, z, weights, weights)
        losses, lse, unit, inv_norm = ops.nt_xent_forward(there[:n], there[n:], temperature, True, 0, n)
        grads = ops.nt_xent_backward(weights.to(device), losses, lse, unit, inv_norm, temperature, True, 0, n, dtype)
        losses = losses.cpu().double()
        found = torch.cat(grads).cpu()[some].double()
        case = f"{n}x{dim} {dtype}".replace("torch.", "")
        # A lost block would change a loss by 64 of some 7,500; operands of 16 bits change it by at most 2^-12 or so.
        off = (losses[some] - (total - partner)).abs().max()
        yield f"losses of {case}", float(off.nan_to_num(math.inf)), loss_allowed

        # dL/du_i = sum_j (g_i p_ij + g_j p_ji) u_j - (g_i + g_pos) u_pos, over the temperature; p_ji by the loss of j.
        pull = of_row + (logits - (losses + all_positive - g.log())).exp_()
        pull[torch.arange(len(some), device="cpu"), positive] -= g[some] + g[positive]
        towards = pull @ u / temperature
        exact = (towards - (towards * u[some]).sum(dim=1, keepdim=True) * u[some]) / length[some]
        # A lost block would change its coordinate by all of it, or by half of it in one direction of the pair.
        off = ((found - exact).abs() / (exact.abs() + exact.abs().median())).max()
        yield f"gradients of {case}", float(off.nan_to_num(math.inf)), allowed
