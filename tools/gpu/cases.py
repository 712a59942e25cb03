"""The cases of the GPU suite: per family its shapes and inputs, a call of the kernel, and plain PyTorch for comparison.

Shapes come in three sizes: ``"tiny"``, for rehearsals and compute-sanitizer; ``"smoke"``, few but so large that every
ring of shared memory of the kernels for sm_90a goes round at least twice on 132 multiprocessors and blocks get several
tiles; and ``"full"``. They need torch alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

import scan_fast
from scan_fast.ops import reference
from scan_fast.ops.augment import RECIPE_HEADER, RECIPE_STEP, Operation, augment
from scan_fast.ops.batch_norm import batch_norm
from scan_fast.ops.families import GPU_FAMILIES

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensors]
FAMILIES = tuple(family.name for family in GPU_FAMILIES)
SM90_FAMILIES = tuple(family.name for family in GPU_FAMILIES if family.sm90 is not None)
"""Those with a second kernel set, for sm_90a."""
SETS = (*((name, "portable") for name in FAMILIES), *((name, "sm90") for name in SM90_FAMILIES))
"""Family and kernel set of all that is verified."""
SIZES = ("tiny", "smoke", "full")
TEMPERATURE = 0.1
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class GradientCase:
    """A function with gradients.

    Attributes:
        family: one of :data:`FAMILIES`.
        label: its size in words.
        shape: of both inputs.
        upstream_shape: of the gradient that comes from above.
        call_of: from ``"native"``, ``"reference"`` or ``"exact"`` (for float64 inputs) to a call with the two inputs
            and the gradient.
    """

    family: str
    label: str
    shape: tuple[int, ...]
    upstream_shape: tuple[int, ...]
    call_of: Callable[[str], Call]

    def runs_on(self, kernels: str, dtype: torch.dtype) -> bool:
        """Return whether a kernel set is meant to take the case: csrc/nt_xent/nt_xent_sm90.cu says what it covers."""
        return kernels == "portable" or self.shape[1] <= (128 if dtype == torch.float32 else 256)


@dataclass(frozen=True)
class NeighborCase:
    """A search: rows, dimensions, neighbours and metric; ``compared`` queries are compared with the reference."""

    rows: int
    dim: int
    k: int
    metric: str
    compared: int

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.rows}x{self.dim} k={self.k} {self.metric}"

    def runs_on(self, kernels: str) -> bool:
        """Return whether a kernel set is meant to take the case: without a fast search there is nothing for sm_90a."""
        return kernels == "portable" or (self.k <= 1024 and 2 * self.k < self.rows)


@dataclass(frozen=True)
class ViewCase:
    """Views: their number, the side of the source and of the view."""

    count: int
    source: int
    side: int

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.count}x{self.source}->{self.side}"


# ---- calls ---------------------------------------------------------------------------------------------------------


def _with_gradients(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    result = function(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result)))


def _nt_xent(both: bool, impl: str) -> Call:
    anchors = "both" if both else "first"

    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        if impl == "exact":
            return exact_nt_xent(z0, z1, upstream, both)

        def losses(a: Tensor, b: Tensor) -> Tensor:
            if impl == "reference":
                return reference.nt_xent(a, b, TEMPERATURE, both)
            return scan_fast.nt_xent(a, b, TEMPERATURE, anchors=anchors, reduction="none", impl="native")

        return _with_gradients(losses, (z0, z1), upstream)

    return call


def _scan_loss(impl: str) -> Call:
    def call(a: Tensor, n: Tensor, upstream: Tensor) -> Tensors:
        def total(x: Tensor, y: Tensor) -> Tensor:
            if impl != "native":
                return reference.scan_loss(x, y, 5.0)[0]
            return scan_fast.scan_loss(x, y, 5.0, impl="native")[0]

        return _with_gradients(total, (a, n), upstream)

    return call


def _self_label(balance: bool, impl: str) -> Call:
    def call(weak: Tensor, strong: Tensor, upstream: Tensor) -> Tensors:
        def loss(x: Tensor) -> Tensor:
            if impl != "native":
                return reference.self_label_loss(weak.to(x.dtype), x, 0.9, balance)[0]
            return scan_fast.self_label_loss(weak, x, 0.9, balance=balance, impl="native")[0]

        return _with_gradients(loss, (strong,), upstream)

    return call


def exact_nt_xent(z0: Tensor, z1: Tensor, upstream: Tensor, both: bool, rows_per_block: int = 1024) -> Tensors:
    """Return the losses of the anchors and the two gradients in float64, block by block: all at once is too much.

    Args:
        z0, z1: (N, D) float64.
        upstream: (2N,), or (N,) where only ``z0`` are anchors; the gradient of each anchor's loss.
        both: whether the rows of ``z1`` are anchors, too.
        rows_per_block: anchors handled at a time.
    """
    n, device = len(z0), z0.device
    anchors = 2 * n if both else n
    z, weight = torch.cat([z0, z1]), upstream.double()
    norm = z.norm(dim=1, keepdim=True).clamp_min(1e-12)
    u = z / norm
    rows = torch.arange(2 * n, device=device)
    positive = rows.roll(n)[:anchors]
    losses, grad_u = u.new_empty(anchors), torch.zeros_like(u)
    for start in range(0, anchors, rows_per_block):
        block = slice(start, min(start + rows_per_block, anchors))
        logits = (u[block] @ u.T / TEMPERATURE).masked_fill_(rows[block, None] == rows, -torch.inf)
        lse = logits.logsumexp(dim=1, keepdim=True)
        losses[block] = lse[:, 0] - logits.gather(1, positive[block, None])[:, 0]
        share = (logits - lse).exp_() * weight[block, None]
        grad_u[block] += share @ u - weight[block, None] * u[positive[block]]
        grad_u += share.T @ u[block]
    grad_u.index_add_(0, positive, u[:anchors] * weight[:, None], alpha=-1)
    grad_u /= TEMPERATURE
    grad = (grad_u - u * (u * grad_u).sum(dim=1, keepdim=True)) / norm
    return losses, grad[:n], grad[n:]


def _batch_norm(on: tuple[bool, bool, bool], unaligned: bool, impl: str) -> Call:
    residual, relu, training = on
    impl = "native" if impl == "native" else "reference"

    def call(x: Tensor, other: Tensor, upstream: Tensor) -> Tensors:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = torch.linspace(0.5, 1.5, x.shape[1], dtype=kind, device=x.device)
        weight, bias, mean, var = channels, (channels - 1) / 10, (channels - 1) / 5, 2 * channels
        if unaligned:
            other = x.new_empty(x.numel() + 1)[1:].as_strided(x.shape, x.stride()).copy_(other)

        def y(*leaves: Tensor) -> Tensor:
            a, w, b, *more = leaves
            options = {"residual": more[0] if more else None, "relu": relu, "training": training, "impl": impl}
            return batch_norm(a, w, b, mean, var, **options)  # type: ignore[arg-type]

        results = _with_gradients(y, (x, weight, bias, *((other,) if residual else ())), upstream)
        return (*results, mean, var)

    return call


# ---- sizes ---------------------------------------------------------------------------------------------------------

_NT_XENT = {
    "tiny": [(3, 5), (37, 40)],
    "smoke": [(37, 40), (4096, 128), (2048, 256)],
    # With 132 multiprocessors, only the last five let rings go round: csrc/nt_xent/sm90_plan.cuh has the sizes.
    "full": [
        (1, 3),
        (65, 33),
        (130, 128),
        (517, 128),
        (200, 200),
        (300, 260),
        (4352, 64),
        (2048, 192),
        (4096, 128),
        (2048, 256),
        (9000, 128),
    ],
}
_SCAN_LOSS = {
    "tiny": [(2, 5, 7), (1, 9, 70)],
    "smoke": [(3, 130, 10), (10, 1024, 1000)],
    "full": [(1, 1, 2), (3, 130, 10), (2, 257, 100), (10, 1024, 1000), (1, 33, 5000)],
}
_SELF_LABEL = {
    "tiny": [(5, 7), (9, 70)],
    "smoke": [(1000, 10), (2048, 1000)],
    "full": [(1, 2), (1000, 10), (257, 100), (2048, 1000), (33, 5000)],
}
_BATCH_NORM = {
    "tiny": [(3, 8, 2, 3), (2, 5, 3, 3)],
    "smoke": [(33, 40, 5, 5), (256, 64, 32, 32)],
    "full": [(2, 3, 5, 7), (64, 64, 16, 16), (33, 40, 5, 5), (8, 512, 4, 4), (5, 130, 9, 9), (256, 64, 32, 32)],
}
_NEIGHBORS = {
    "tiny": [NeighborCase(70, 9, 3, "cosine", 70), NeighborCase(40, 33, 39, "dot", 40)],
    "smoke": [NeighborCase(1000, 128, 20, "cosine", 1000), NeighborCase(20000, 128, 20, "cosine", 500)],
    # csrc/neighbors/sm90_schedule.cuh has the sizes at which rings go round: the last four.
    "full": [
        NeighborCase(70, 9, 3, "cosine", 70),
        NeighborCase(1000, 128, 20, "cosine", 1000),
        NeighborCase(3001, 70, 50, "dot", 3001),
        NeighborCase(5000, 512, 20, "cosine", 1000),
        NeighborCase(20000, 64, 20, "cosine", 500),
        NeighborCase(20000, 256, 20, "dot", 500),
        NeighborCase(20000, 128, 20, "cosine", 500),
        NeighborCase(40000, 128, 20, "cosine", 1000),
    ],
}
_VIEWS = {
    # A warp an image, a block an image, and a block without shared memory of its own for the image.
    "tiny": [ViewCase(9, 14, 11), ViewCase(2, 30, 35)],
    "smoke": [ViewCase(203, 32, 32), ViewCase(9, 24, 19), ViewCase(5, 100, 96), ViewCase(3, 150, 130)],
    # 17 to 22 and 111 to 113: around the limits of a block's shared memory.
    "full": [
        ViewCase(203, 32, 32),
        ViewCase(11, 24, 17),
        ViewCase(9, 30, 19),
        ViewCase(9, 20, 22),
        ViewCase(17, 70, 48),
        ViewCase(5, 100, 96),
        ViewCase(3, 120, 111),
        ViewCase(3, 90, 113),
        ViewCase(3, 150, 130),
    ],
}


def gradient_cases(size: str) -> Iterator[GradientCase]:
    """Yield the cases of the families with gradients."""
    for shape in _NT_XENT[size]:
        for both in (True, False):
            if both or shape[0] <= 4096:
                label = f"{shape[0]}x{shape[1]} {'both' if both else 'first'}"
                maker = partial(_nt_xent, both)
                yield GradientCase("nt_xent", label, shape, ((2 if both else 1) * shape[0],), maker)
    for shape3 in _SCAN_LOSS[size]:
        yield GradientCase("scan_loss", "x".join(map(str, shape3)), shape3, shape3[:1], _scan_loss)
    for shape in _SELF_LABEL[size]:
        for balance in (True, False):
            label = f"{shape[0]}x{shape[1]} {'balanced' if balance else 'plain'}"
            yield GradientCase("self_label", label, shape, (), partial(_self_label, balance))
    for shape4 in _BATCH_NORM[size]:
        # Residual, ReLU, training.
        for on in ((False, True, True), (True, True, True), (False, False, True), (True, True, False)):
            words = [name for name, wanted in zip(("residual", "relu", "training"), on, strict=True) if wanted]
            label = f"{'x'.join(map(str, shape4))} {' '.join(words)}"
            yield GradientCase("batch_norm", label, shape4, shape4, partial(_batch_norm, on, False))
        if shape4[1] % 8 == 0 and shape4[0] <= 64:
            # Every other tensor can be read by 16 bytes: the passes must agree on what a bit of the mask means.
            label = f"{'x'.join(map(str, shape4))} unaligned residual relu training"
            yield GradientCase("batch_norm", label, shape4, shape4, partial(_batch_norm, (True, True, True), True))


def neighbor_cases(size: str, kernels: str = "portable") -> list[NeighborCase]:
    """Return the searches that a kernel set is meant to take."""
    return [case for case in _NEIGHBORS[size] if case.runs_on(kernels)]


def view_cases(size: str) -> list[ViewCase]:
    """Return the views."""
    return _VIEWS[size]


# ---- inputs --------------------------------------------------------------------------------------------------------


def gradient_inputs(case: GradientCase, seed: int) -> Tensors:
    """Return the two inputs and the gradient from above, float32 on the CPU."""
    return _gradient_inputs(case.family, case.shape, case.upstream_shape, seed)


@lru_cache(maxsize=2)  # the same for several dtypes and options
def _gradient_inputs(family: str, shape: tuple[int, ...], upstream_shape: tuple[int, ...], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator)
    second = first + torch.randn(shape, generator=generator)
    if family == "self_label":
        # Rows stand out by 20 or not at all: none is near the threshold, where rounding would decide.
        rows, classes = shape
        label = torch.randint(0, classes, (rows,), generator=generator)
        first[torch.arange(rows), label] += 20.0 * (torch.rand(rows, generator=generator) < 0.7)
    upstream = 1 + torch.rand(upstream_shape, generator=generator)
    if family == "batch_norm":
        # Half the values far above zero, half far below: no sign before the ReLU is one that rounding would decide.
        n, _, h, w = (torch.arange(size) for size in shape)
        side = 1.0 - 2 * ((n[:, None, None, None] + h[:, None] + w) % 2)
        first, second = side * (1 + first.abs() / 4), side * (second - first).abs()
        first, second, upstream = (x.contiguous(memory_format=torch.channels_last) for x in (first, second, upstream))
    return first, second, upstream


def neighbor_inputs(case: NeighborCase, seed: int) -> tuple[Tensor, Tensor]:
    """Return rows with duplicates and a NaN, and queries."""
    rows, dim = case.rows, case.dim
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    x[rows // 2 : rows // 2 + 5] = x[0]  # duplicates: ties by index
    x[1, 0] = float("nan")
    return x, torch.randn(rows // 2 + 1, dim, generator=generator)


VIEW_DTYPES = (torch.uint8, torch.float32, torch.bfloat16)


def views(images: Tensor, recipes: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    return augment(images, recipes, side, (0.017, 0.021, 0.019), (-2.1, -1.9, 0.3), dtype)


def view_inputs(case: ViewCase, seed: int) -> tuple[Tensor, Tensor]:
    """Return noise, and recipes of five operations each with boxes, mirroring and cutouts."""
    count, source, side = case.count, case.source, case.side
    generator = torch.Generator().manual_seed(seed)

    def below(bound: Tensor | int) -> Tensor:
        bounds = torch.as_tensor(bound).expand(count)
        return (torch.rand(count, generator=generator) * bounds).int().minimum(bounds - 1)

    images = torch.randint(0, 256, (count, source, source, 3), generator=generator, dtype=torch.uint8)
    height, width, top, left = (below(bound) for bound in (source, source, side, side))
    height, width = height + 1, width + 1
    box = (below(source - height + 1), below(source - width + 1), height, width)
    cutout = (top, left, top + below(side - top + 1), left + below(side - left + 1))
    recipes = torch.zeros(count, RECIPE_HEADER + 5 * RECIPE_STEP, dtype=torch.int32)
    recipes[:, :RECIPE_HEADER] = torch.stack((*box, below(2), *cutout), dim=1)
    steps = recipes[:, RECIPE_HEADER:].view(count, 5, RECIPE_STEP)
    steps[..., 0] = torch.randint(0, len(Operation), (count, 5), generator=generator)
    amount = torch.rand(count, 5, generator=generator)
    kind = steps[..., 0]
    amount = torch.where(kind == Operation.HUE, amount - 0.5, 2 * amount)
    amount = torch.where(kind == Operation.SOLARIZE, 128 * amount, amount)
    amount = torch.where(kind == Operation.POSTERIZE, (4 * amount).floor(), amount)
    steps[..., 1] = amount.view(torch.int32)
    maps = torch.tensor([[1.0, 0.1, -2.0], [-0.1, 1.0, 1.0]]) + 0.2 * torch.rand(count, 5, 2, 3, generator=generator)
    bilinear, nearest = kind == Operation.BILINEAR, kind == Operation.NEAREST
    steps[..., 1:][bilinear] = maps.flatten(2).view(torch.int32)[bilinear]
    # Start, per column, per row.
    steps[..., 1:][nearest] = (65536 * maps.roll(1, dims=3).flatten(2)).int()[nearest]
    return images, recipes
