"""Self-tests of the kernels: fixed inputs, small and odd shapes, compared with the references.

They decide whether a GPU on which nobody has checked the kernels may use them (:mod:`scan_fast.ops.trust`), so they
are short: what is exact is computed on the CPU, in float64, and the device runs nothing but the kernels under test,
copies, and the filling of memory with NaN. A kernel may err at most twice as much as plain PyTorch in the same
precision, plus a few units in the last place, in norm and in each element; neighbours and views must be right in every
bit. What no such sum can afford, the long way through the rings of the sm_90a kernels, is covered by problems of 6,144
rows whose answer is known from a few rows each (:func:`_nt_xent_long`, :func:`_neighbors_long`).
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native, reference
from .augment import RECIPE_HEADER, RECIPE_STEP, Operation

Tensors = tuple[Tensor, ...]
Finding = tuple[str, float, float]
"""A case, its error, and the error that is allowed."""

SEED = 20200525
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
_BLOCK = 64  # rows of a tile of any kernel are a multiple of it


@dataclass(frozen=True)
class Result:
    """What a self-test found.

    Attributes:
        passed: whether every case kept within what is allowed.
        reason: the first case that did not, in words; empty if none.
        worst: the largest error of a case as a share of what is allowed.
        milliseconds: of the whole test.
    """

    passed: bool
    reason: str
    worst: float
    milliseconds: float


def run(family: str, kernels: str, device: torch.device) -> Result:
    """Test the kernels of a family on a device.

    Args:
        family: a name of :data:`scan_fast.ops.families.FAMILIES` that has an entry in :data:`TESTS`.
        kernels: ``"portable"`` or ``"sm90"``; on the CPU both mean its kernels.
        device: where they run; what calls must wait for them.

    Returns:
        the finding. What the kernels raise is not caught.
    """
    return _elsewhere(lambda: _run(family, kernels, device))


def _run(family: str, kernels: str, device: torch.device) -> Result:
    begin = time.perf_counter()
    worst, reason = 0.0, ""
    with _kernel_set(family, kernels, device), _full_precision(), _one_thread():
        for case, error, allowed in TESTS[family](device):
            share = error / allowed if allowed > 0 else math.inf if error > 0 else 0.0
            if not error <= allowed:
                reason = reason or f"{case}: error {error:.1e}, allowed {allowed:.1e}"
                share = max(share, 1.0) if share == share else math.inf
            worst = max(worst, share)
    return Result(not reason, reason, worst, 1000 * (time.perf_counter() - begin))


def _elsewhere(work: Callable[[], Result]) -> Result:
    """Run in a thread of its own and wait: the caller may be in any state that PyTorch keeps per thread.

    Such are inference mode, autocast, a default device, a transformation of functorch, the fake tensors of a compiler,
    the stream.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, name="scan_fast self-test", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


@contextlib.contextmanager
def _kernel_set(family: str, kernels: str, device: torch.device) -> Iterator[None]:
    """Have a family take its portable kernels or those for sm_90a, on the device."""
    before = native.takes_sm90(family)
    if device.type != "cuda":
        yield
        return
    native.take_sm90(family, kernels == "sm90")
    try:
        with torch.cuda.device(device):
            yield
    finally:
        native.take_sm90(family, before)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Let float32 products be float32 products: 16-bit inputs test the others, whatever the user has asked for."""
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the settings that came with fp32_precision are in use
        legacy = None
    if legacy == "medium":
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision("medium")
    elif legacy is None and matmul.fp32_precision == "bf16":
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = "bf16"
    else:
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread of the CPU: a busy machine's threads wait for each other far longer than these sums take.

    The number is the calling thread's own; that of MKL is every thread's for the while.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# ---- tools ---------------------------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator("cpu").manual_seed(SEED)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")


def _poison(device: torch.device, *like: Tensor) -> None:
    """Leave NaN in the memory that results of these shapes get next: an allocator keeps freed blocks by size."""
    blocks = [torch.full(x.shape, math.nan, dtype=torch.float32, device=device) for x in like for _ in range(3)]
    del blocks


def _with_gradients(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    result = function(*leaves)
    # Without grad_outputs, which would import the compiler's symbolic shapes at first.
    return (result.detach(), *torch.autograd.grad((result * upstream.to(result)).sum(), leaves))


def _error(found: Tensors, exact: Tensors) -> float:
    """Return the largest error of a tensor, in norm and of an element, as a share of the exact tensor's."""
    worst = 0.0
    for ours, right in zip(found, exact, strict=True):
        ours, right = ours.detach().to("cpu", torch.float64), right.to(torch.float64)
        if ours.shape != right.shape or not bool(ours.isfinite().all()):
            return math.inf
        difference = ours - right
        for size in (lambda x: float(x.norm()), lambda x: float(x.abs().max())):
            scale = size(right)
            worst = max(worst, size(difference) / scale if scale > 0 else size(difference))
    return worst


def _slack(family: str, dtype: torch.dtype, device: torch.device) -> int:
    """Return the units in the last place that a kernel may err besides twice what plain PyTorch does."""
    if dtype != torch.float32:
        # NT-Xent multiplies 16-bit inputs in 16 bits, where plain PyTorch multiplies them in float32.
        return 8 if family == "nt_xent" else 2
    if device.type == "cpu":
        # An element may be 2^-22 of the largest one off.
        return 4
    # Matrix units cut off sums instead of rounding them, times 1 / temperature; the fast exp2 errs by two units.
    return 64 if family == "nt_xent" else 16


def _compared(
    family: str,
    case: str,
    dtype: torch.dtype,
    device: torch.device,
    kernel: Callable[..., Tensors],
    plain: Callable[..., Tensors],
    cpu: Tensors,
) -> Finding:
    """Hold a kernel to the reference: `cpu` has the inputs, of which the last is the upstream gradient in float32."""
    inputs = (*(x.to(dtype) for x in cpu[:-1]), cpu[-1])
    exact = plain(*(x.double() for x in inputs))
    allowed = 2 * _error(plain(*inputs), exact) + _slack(family, dtype, device) * ROUNDING[dtype]
    there = tuple(x.to(device) for x in inputs)
    _poison(device, *exact)
    return f"{case} {dtype}".replace("torch.", ""), _error(kernel(*there), exact), allowed


# ---- NT-Xent -------------------------------------------------------------------------------------------------------


def _nt_xent_kernel(temperature: float, both: bool, begin: int, count: int) -> Callable[..., Tensors]:
    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        ops, n = torch.ops.scan_fast, z0.shape[0]
        losses, lse, unit, inv_norm = ops.nt_xent_forward(z0, z1, temperature, both, 0, n)
        local = losses
        if count < n:
            local = ops.nt_xent_forward(z0, z1, temperature, both, begin, count)[0]
        grads = ops.nt_xent_backward(upstream, losses, lse, unit, inv_norm, temperature, both, begin, count, z0.dtype)
        return (local, *grads)

    return call


def _nt_xent_plain(temperature: float, both: bool, begin: int, count: int) -> Callable[..., Tensors]:
    rows = slice(begin, begin + count)

    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        losses, *grads = _with_gradients(lambda a, b: reference.nt_xent(a, b, temperature, both), (z0, z1), upstream)
        return (losses.view(-1, z0.shape[0])[:, rows].flatten(), *(grad[rows] for grad in grads))

    return call


def _nt_xent(device: torch.device) -> Iterator[Finding]:
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
        generator = _generator()
        z0 = _normal(generator, rows, dim)
        cpu = (z0, z0 + _normal(generator, rows, dim), 1 + _uniform(generator, (2 if both else 1) * rows))
        functions = (f(temperature, both, begin, count) for f in (_nt_xent_kernel, _nt_xent_plain))
        kernel, plain = functions
        for dtype in dtypes:
            yield _compared("nt_xent", f"{rows}x{dim} at {temperature}", dtype, device, kernel, plain, cpu)
    yield from _nt_xent_long(device)


def _nt_xent_long(device: torch.device) -> Iterator[Finding]:
    """Many tiles for every multiprocessor: 3,072 samples, of which the exact losses and gradients of 96 rows are known.

    Row r is near the unit vector of its block of 64, r // 64. So coordinate b of a row's gradient comes from block b
    almost alone: a tile that was left out, taken twice or mixed up with another shows in full.
    """
    n, dim, temperature = 3072, 96, 0.5
    rows = 2 * n
    z = 0.25 / math.sqrt(dim) * (2 * _uniform(_generator(), rows, dim) - 1)
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
        _poison(device, z, z, weights, weights)
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


# ---- SCAN and self-label losses ------------------------------------------------------------------------------------


def _scan_kernel(anchors: Tensor, neighbors: Tensor, upstream: Tensor) -> Tensors:
    ops = torch.ops.scan_fast
    total, consistency, entropy, mean_prob, row_stats = ops.scan_loss_forward(anchors, neighbors, 5.0)
    grads = ops.scan_loss_backward(upstream, None, None, anchors, neighbors, mean_prob, row_stats, 5.0)
    return (total, consistency, entropy, *grads)


def _scan_plain(anchors: Tensor, neighbors: Tensor, upstream: Tensor) -> Tensors:
    values: list[Tensor] = []

    def total(a: Tensor, n: Tensor) -> Tensor:
        values[:] = reference.scan_loss(a, n, 5.0)
        return values[0]

    results = _with_gradients(total, (anchors, neighbors), upstream)
    return (*(value.detach() for value in values), *results[1:])


def _scan_loss(device: torch.device) -> Iterator[Finding]:
    # Heads, rows, classes: up to a few classes, to 1,024 and beyond, kernels are different ones; odd classes are not
    # read as vectors.
    for shape, dtypes in (
        ((2, 5, 7), FLOATS),
        ((3, 130, 10), FLOATS[:2]),
        ((2, 65, 100), FLOATS[:2]),
        ((1, 33, 1000), FLOATS[:2]),
        ((1, 9, 1027), FLOATS[:2]),
    ):
        generator = _generator()
        first = _normal(generator, *shape)
        cpu = (first, first + _normal(generator, *shape), 1 + _uniform(generator, shape[0]))
        for dtype in dtypes:
            case = "x".join(map(str, shape))
            yield _compared("scan_loss", case, dtype, device, _scan_kernel, _scan_plain, cpu)


def _self_label(device: torch.device) -> Iterator[Finding]:
    for (rows, classes), balance, dtypes in (
        ((5, 7), True, FLOATS),
        ((300, 10), False, FLOATS[:2]),
        ((300, 10), True, FLOATS[:2]),
        ((65, 100), True, FLOATS[:2]),
        ((9, 1027), True, FLOATS[:2]),
    ):
        generator = _generator()
        strong, weak = _normal(generator, rows, classes), _normal(generator, rows, classes)
        # Rows stand out by 20 or not at all: none is near the threshold, where rounding would decide.
        label = torch.arange(rows, device="cpu") * 7 % classes
        weak[torch.arange(rows, device="cpu"), label] += 20.0 * (_uniform(generator, rows) < 0.7)
        upstream = 1 + _uniform(generator)

        def kernel(weak: Tensor, strong: Tensor, upstream: Tensor, balance: bool = balance) -> Tensors:
            ops = torch.ops.scan_fast
            loss, count, target, row_weight, row_stats = ops.self_label_forward(weak, strong, 0.9, balance)
            return loss, count, ops.self_label_backward(upstream, strong, target, row_weight, row_stats)

        def plain(weak: Tensor, strong: Tensor, upstream: Tensor, balance: bool = balance) -> Tensors:
            counts: list[Tensor] = []

            def loss(x: Tensor) -> Tensor:
                value, count = reference.self_label_loss(weak, x, 0.9, balance)
                counts[:] = [count]
                return value

            value, gradient = _with_gradients(loss, (strong,), upstream)
            return value, counts[0], gradient

        for dtype in dtypes:
            case = f"{rows}x{classes}{' balanced' if balance else ''}"
            yield _compared("self_label", case, dtype, device, kernel, plain, (weak, strong, upstream))


# ---- batch normalisation -------------------------------------------------------------------------------------------


def _channels(count: int, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Weight, bias, running mean, running variance."""
    steps = torch.linspace(0.5, 1.5, count, dtype=torch.float32, device="cpu").to(device, dtype)
    return steps, (steps - 1) / 10, (steps - 1) / 5, 2 * steps


def _batch_norm(device: torch.device) -> Iterator[Finding]:
    # Shape, residual, ReLU, training, dtypes.
    for shape, residual, relu, training, dtypes in (
        ((2, 3, 5, 7), True, True, True, FLOATS),
        ((8, 64, 6, 6), True, True, True, FLOATS),
        ((8, 64, 6, 6), False, True, True, FLOATS[:2]),
        ((9, 40, 5, 5), False, False, True, FLOATS[:2]),
        ((9, 40, 5, 5), True, True, False, FLOATS[:2]),
        ((4, 512, 3, 3), True, False, True, FLOATS[:2]),
    ):
        generator = _generator()
        # Half the values far above zero, half far below: no sign before the ReLU is one that rounding would decide.
        n, _, h, w = (torch.arange(size, device="cpu") for size in shape)
        side = 1.0 - 2 * ((n[:, None, None, None] + h[:, None] + w) % 2)
        x, other = (side * (1 + _normal(generator, *shape).abs() / 4) for _ in range(2))
        upstream = 1 + _uniform(generator, *shape)

        def kernel(
            x: Tensor,
            other: Tensor,
            upstream: Tensor,
            residual: bool = residual,
            relu: bool = relu,
            training: bool = training,
        ) -> Tensors:
            ops = torch.ops.scan_fast
            last = torch.channels_last
            x, upstream = x.contiguous(memory_format=last), upstream.to(x.dtype).contiguous(memory_format=last)
            # A residual may begin at an address that is no multiple of a vector's width.
            odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].as_strided_(x.shape, x.stride())
            added = odd.copy_(other) if residual else None
            weight, bias, mean, var = _channels(x.shape[1], x.device, torch.float32)
            y, *kept = ops.batch_norm_forward(
                x, added, weight, bias, mean, var, training, 0.1, 1e-5, relu, residual and relu
            )
            grads = ops.batch_norm_backward(upstream, x, weight, bias, *kept, training, relu, residual)
            return (y, mean, var, *(grad for i, grad in enumerate(grads) if residual or i != 1))

        def plain(
            x: Tensor,
            other: Tensor,
            upstream: Tensor,
            residual: bool = residual,
            relu: bool = relu,
            training: bool = training,
        ) -> Tensors:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            weight, bias, mean, var = _channels(x.shape[1], x.device, wide)

            def y(x: Tensor, *more: Tensor) -> Tensor:
                *added, w, b = more
                return reference.batch_norm(
                    x, added[0] if added else None, w, b, mean, var,
                    training=training, momentum=0.1, eps=1e-5, relu=relu,
                )  # fmt: skip

            leaves = (x, other, weight, bias) if residual else (x, weight, bias)
            value, *grads = _with_gradients(y, leaves, upstream.to(x.dtype))
            return (value, mean, var, *grads)

        words = (("residual", residual), ("ReLU", relu), ("training", training))
        case = " ".join(["x".join(map(str, shape)), *(word for word, wanted in words if wanted)])
        for dtype in dtypes:
            yield _compared("batch_norm", case, dtype, device, kernel, plain, (x, other, upstream))


# ---- neighbours ----------------------------------------------------------------------------------------------------


def _neighbors(device: torch.device) -> Iterator[Finding]:
    for rows, dim, k, metric, others in (
        (70, 9, 3, "cosine", 0),
        (300, 70, 20, "dot", 0),
        (400, 128, 20, "cosine", 150),
        (200, 300, 10, "cosine", 0),
    ):
        generator = _generator()
        x = _normal(generator, rows, dim)
        x[rows // 2 : rows // 2 + 5] = x[0]  # duplicates: ties by index
        x[1, 0] = math.nan
        if metric == "dot":
            x = (4 * x).round()  # many ties
        queries = _normal(generator, others, dim) if others else x
        normalize, itself = metric == "cosine", others == 0
        exact = reference.topk_neighbors(queries, x, k, normalize, itself)
        there = x.to(device)
        asked = queries.to(device) if others else there
        _poison(device, *exact)
        found = torch.ops.scan_fast.topk_neighbors(asked, there, k, normalize, itself)
        yield _same(f"{rows}x{dim} k={k} {metric}", found[:2], exact)
    yield from _neighbors_long(device)


def _neighbors_long(device: torch.device) -> Iterator[Finding]:
    """Many tiles for every multiprocessor: 6,144 rows, whose neighbours are among 48 each, one in every 128 rows.

    Row r is near the unit vector r % 128, so the rows of another number are far.
    """
    dim, members, k = 128, 48, 40
    rows = dim * members
    x = 0.4 / math.sqrt(dim) * (2 * _uniform(_generator(), rows, dim) - 1)
    every = torch.arange(rows, device="cpu")
    x[every, every % dim] += 1
    there = x.to(device)
    _poison(device, x[:, :k], x[:, :k])
    similarity, index = (y.cpu() for y in torch.ops.scan_fast.topk_neighbors(there, there, k, True, True)[:2])
    some = torch.arange(0, dim, 2, device="cpu")  # every other group, all of its rows
    groups = x.double().view(members, dim, dim).transpose(0, 1)[some]
    length = groups.norm(dim=2)
    near = (groups @ groups.transpose(1, 2) / (length[:, :, None] * length[:, None])).float()
    near.diagonal(dim1=1, dim2=2).fill_(-math.inf)
    value, member = near.sort(dim=2, descending=True, stable=True)

    def of_groups(y: Tensor) -> Tensor:
        return y.view(members, dim, k).transpose(0, 1)[some]

    exact = (value[..., :k], member[..., :k] * dim + some[:, None, None])
    yield _same(f"{rows}x{dim} k={k}", (of_groups(similarity), of_groups(index)), exact)


def _same(case: str, found: Tensors, exact: Tensors) -> Finding:
    """Count the values that are not the same in every bit: none is allowed."""
    wrong = sum(
        int((ours.cpu() != right).sum()) if ours.shape == right.shape else right.numel()
        for ours, right in zip(found, exact, strict=True)
    )
    return f"{case}: {wrong} values differ", float(wrong), 0.0


# ---- views ---------------------------------------------------------------------------------------------------------

_SCALE, _SHIFT = (0.017, 0.021, 0.019), (-2.1, -1.9, 0.3)


def _augment(device: torch.device) -> Iterator[Finding]:
    """Views have the same bits on every device, so what a GPU makes is held to what the CPU's kernel makes.

    On the CPU, whose kernel the tests hold to PIL, each image is rendered by itself and compared with the batch; and
    the crops that keep their size and the mirroring are done again in plain PyTorch.
    """
    # Images, side of the source, side of the view: a warp an image, a block, and no shared memory.
    for count, source, side in ((9, 14, 11), (17, 32, 32), (3, 30, 21), (3, 60, 48), (1, 140, 130)):
        images, recipes = _view_inputs(count, source, side)
        for dtype in (torch.uint8, torch.float32, torch.bfloat16) if count == 9 else (torch.float32,):

            def views(images: Tensor, recipes: Tensor, side: int = side, dtype: torch.dtype = dtype) -> Tensor:
                return torch.ops.scan_fast.augment(images, None, recipes, side, _SCALE, _SHIFT, dtype)

            exact = torch.cat([views(images[i : i + 1], recipes[i : i + 1]) for i in range(count)])
            _poison(device, exact)
            found = views(images.to(device), recipes)
            yield _same(f"{count}x{source}->{side} {dtype}".replace("torch.", ""), (found,), (exact,))
    images, recipes = _view_inputs(9, 24, 24)
    recipes[:, :4] = torch.tensor([0, 0, 24, 24], dtype=torch.int32, device="cpu")
    recipes[:, RECIPE_HEADER::RECIPE_STEP] = int(Operation.IDENTITY)
    found = torch.ops.scan_fast.augment(images.to(device), None, recipes, 24, _SCALE, _SHIFT, torch.uint8)
    mirrored = torch.where(recipes[:, 4, None, None, None] == 1, images.flip(2), images)
    yield _same("9x24 mirrored", (found,), (mirrored,))


def _view_inputs(count: int, source: int, side: int) -> Tensors:
    """Noise, and recipes of five operations each with boxes, mirroring and cutouts."""
    generator = _generator()

    def below(bound: Tensor | int) -> Tensor:
        bounds = torch.as_tensor(bound, dtype=torch.int32, device="cpu").expand(count)
        return (_uniform(generator, count) * bounds).int().minimum(bounds - 1)

    images = (256 * _uniform(generator, count, source, source, 3)).to(torch.uint8)
    height, width, top, left = (below(bound) for bound in (source, source, side, side))
    height, width = height + 1, width + 1
    box = (below(source - height + 1), below(source - width + 1), height, width)
    cutout = (top, left, top + below(side - top + 1), left + below(side - left + 1))
    recipes = torch.zeros((count, RECIPE_HEADER + 5 * RECIPE_STEP), dtype=torch.int32, device="cpu")
    recipes[:, :RECIPE_HEADER] = torch.stack((*box, below(2), *cutout), dim=1)
    steps = recipes[:, RECIPE_HEADER:].view(count, 5, RECIPE_STEP)
    # Every operation comes up, in turn.
    steps[..., 0] = (torch.arange(5 * count, device="cpu").view(count, 5) * 3 + 1) % len(Operation)
    kind, amount = steps[..., 0], _uniform(generator, count, 5)
    amount = torch.where(kind == Operation.HUE, amount - 0.5, 2 * amount)
    amount = torch.where(kind == Operation.SOLARIZE, 128 * amount, amount)
    amount = torch.where(kind == Operation.POSTERIZE, (4 * amount).floor(), amount)
    steps[..., 1] = amount.view(torch.int32)
    turned = torch.tensor([[1.0, 0.1, -2.0], [-0.1, 1.0, 1.0]], dtype=torch.float32, device="cpu")
    maps = turned + 0.2 * _uniform(generator, count, 5, 2, 3)
    bilinear, nearest = kind == Operation.BILINEAR, kind == Operation.NEAREST
    steps[..., 1:][bilinear] = maps.flatten(2).view(torch.int32)[bilinear]
    # Start, per column, per row.
    steps[..., 1:][nearest] = (65536 * maps.roll(1, dims=3).flatten(2)).int()[nearest]
    return images, recipes


TESTS: dict[str, Callable[[torch.device], Iterator[Finding]]] = {
    "augment": _augment,
    "batch_norm": _batch_norm,
    "neighbors": _neighbors,
    "nt_xent": _nt_xent,
    "scan_loss": _scan_loss,
    "self_label": _self_label,
}
"""The cases of each family with GPU kernels."""
