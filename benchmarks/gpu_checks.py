"""Checks of the compiled kernels on a device, without pytest: ``python -m benchmarks.gpu_checks CHECK --device cuda``.

``accuracy``: fresh inputs (the seed is printed) and freed memory poisoned with NaN, so that an element nobody writes
shows; against float64, a kernel may err at most twice as much as plain PyTorch in the same precision, plus a few units
in the last place; neighbours and views must be right in every bit. ``repeat``: the same call twice gives the same bits.
``graph``: a CUDA graph of a call, replayed on other inputs, gives what the call gives (on the CPU, which has no graphs,
the call itself is replayed); the views are not among them, because the host reads their recipes. ``tiny``: every
operator once on shapes that are small and odd, for compute-sanitizer; it calls few operations of PyTorch's own. Prints
one JSON line per family.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

import scan_fast
from scan_fast.ops import native, reference
from scan_fast.ops.augment import RECIPE_HEADER, RECIPE_STEP, Operation, augment
from scan_fast.ops.batch_norm import batch_norm

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensors]
FAMILIES = ("nt_xent", "scan_loss", "self_label", "batch_norm", "neighbors", "augment")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


def _poison(device: str) -> None:
    """Leave NaN in the memory that the next allocations get: CUDA's allocator keeps freed blocks by size."""
    sizes = (64, 4096, 1 << 18, 1 << 22) if device == "cuda" else (64, 4096)
    blocks = [torch.full((size,), float("nan"), device=device) for size in sizes for _ in range(6)]
    del blocks


def _with_gradients(function: Callable[..., Tensor], inputs: Tensors, upstream: Tensor) -> Tensors:
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    result = function(*leaves)
    return (result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result)))


# ---- per family: shapes, inputs, ours, plain PyTorch --------------------------------------------------------------


def _nt_xent(shape: tuple[int, ...], both: bool, impl: str) -> Call:
    anchors = "both" if both else "first"

    def call(z0: Tensor, z1: Tensor, upstream: Tensor) -> Tensors:
        def losses(a: Tensor, b: Tensor) -> Tensor:
            if impl == "reference":
                return reference.nt_xent(a, b, 0.1, both)
            return scan_fast.nt_xent(a, b, 0.1, anchors=anchors, reduction="none", impl="native")

        return _with_gradients(losses, (z0, z1), upstream)

    return call


def _scan_loss(shape: tuple[int, ...], impl: str) -> Call:
    def call(a: Tensor, n: Tensor, upstream: Tensor) -> Tensors:
        def total(x: Tensor, y: Tensor) -> Tensor:
            if impl == "reference":
                return reference.scan_loss(x, y, 5.0)[0]
            return scan_fast.scan_loss(x, y, 5.0, impl="native")[0]

        return _with_gradients(total, (a, n), upstream)

    return call


def _self_label(shape: tuple[int, ...], balance: bool, impl: str) -> Call:
    def call(weak: Tensor, strong: Tensor, upstream: Tensor) -> Tensors:
        def loss(x: Tensor) -> Tensor:
            if impl == "reference":
                return reference.self_label_loss(weak.to(x.dtype), x, 0.9, balance)[0]
            return scan_fast.self_label_loss(weak, x, 0.9, balance=balance, impl="native")[0]

        return _with_gradients(loss, (strong,), upstream)

    return call


def _batch_norm(on: tuple[bool, bool, bool], impl: str) -> Call:
    residual, relu, training = on

    def call(x: Tensor, other: Tensor, upstream: Tensor) -> Tensors:
        kind = torch.float64 if x.dtype == torch.float64 else torch.float32
        channels = torch.linspace(0.5, 1.5, x.shape[1], dtype=kind, device=x.device)
        weight, bias, mean, var = channels, (channels - 1) / 10, (channels - 1) / 5, 2 * channels

        def y(*leaves: Tensor) -> Tensor:
            a, w, b, *more = leaves
            options = {"residual": more[0] if more else None, "relu": relu, "training": training, "impl": impl}
            return batch_norm(a, w, b, mean, var, **options)  # type: ignore[arg-type]

        results = _with_gradients(y, (x, weight, bias, *((other,) if residual else ())), upstream)
        return (*results, mean, var)

    return call


def _gradient_cases(tiny: bool) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...], Callable[[str], Call]]]:
    """Yield family, label, input shape, upstream shape, and the maker of a call by implementation."""
    shapes = [(3, 5), (37, 40)] if tiny else [(1, 3), (65, 33), (130, 128), (517, 128), (200, 200), (300, 260)]
    for shape in shapes:
        for both in (True, False):
            anchors = (2 if both else 1) * shape[0]
            label = f"{shape[0]}x{shape[1]} {'both' if both else 'first'}"
            yield "nt_xent", label, shape, (anchors,), lambda impl, s=shape, b=both: _nt_xent(s, b, impl)  # type: ignore[misc]
    shapes3 = (
        [(2, 5, 7), (1, 9, 70)] if tiny else [(1, 1, 2), (3, 130, 10), (2, 257, 100), (10, 128, 1000), (1, 33, 5000)]
    )
    for shape3 in shapes3:
        label = "x".join(map(str, shape3))
        yield "scan_loss", label, shape3, shape3[:1], lambda impl, s=shape3: _scan_loss(s, impl)  # type: ignore[misc]
    shapes = [(5, 7), (9, 70)] if tiny else [(1, 2), (1000, 10), (257, 100), (512, 1000), (33, 5000)]
    for shape in shapes:
        for balance in (True, False):
            label = f"{shape[0]}x{shape[1]} {'balanced' if balance else 'plain'}"
            yield "self_label", label, shape, (), lambda impl, s=shape, b=balance: _self_label(s, b, impl)  # type: ignore[misc]
    shapes4 = [(3, 8, 2, 3), (2, 5, 3, 3)] if tiny else [(2, 3, 5, 7), (64, 64, 16, 16), (33, 40, 5, 5), (8, 512, 4, 4)]
    for shape4 in shapes4 if tiny else [*shapes4, (5, 130, 9, 9), (256, 16, 20, 20)]:
        # Residual, ReLU, training.
        for on in ((False, True, True), (True, True, True), (False, False, True), (True, True, False)):
            words = [name for name, wanted in zip(("residual", "relu", "training"), on, strict=True) if wanted]
            label = f"{'x'.join(map(str, shape4))} {' '.join(words)}"
            yield "batch_norm", label, shape4, shape4, lambda impl, o=on: _batch_norm(o, impl)  # type: ignore[misc]


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


def _relative(ours: Tensors, exact: Tensors) -> float:
    worst = 0.0
    for a, b in zip(ours, exact, strict=True):
        if not bool(a.isfinite().all()):
            return float("inf")
        scale = float(b.norm())
        worst = max(worst, float((a.double() - b).norm()) / scale if scale > 0 else float(a.double().norm()))
    return worst


def _slack(family: str, dtype: torch.dtype, device: str) -> int:
    """Units in the last place that a kernel may err besides twice what plain PyTorch does."""
    if dtype != torch.float32:
        # NT-Xent multiplies 16-bit inputs in 16 bits, where plain PyTorch multiplies them in float32.
        return 8 if family == "nt_xent" else 2
    if device == "cpu":
        return 2
    # Matrix units cut off sums instead of rounding them, times 1 / temperature; the fast exp2 errs by two units.
    return 64 if family == "nt_xent" else 16


# ---- the checks ----------------------------------------------------------------------------------------------------


def accuracy(device: str, seed: int, tiny: bool, families: Sequence[str] = FAMILIES) -> dict[str, list[str]]:
    """Return the failures of each of the families."""
    failures: dict[str, list[str]] = {family: [] for family in families}
    for family, label, shape, upstream_shape, call_of in _gradient_cases(tiny):
        if family not in families:
            continue
        for dtype in DTYPES:
            cpu = _gradient_inputs(family, shape, upstream_shape, seed)
            inputs = (*(x.to(device, dtype) for x in cpu[:2]), cpu[2].to(device))
            exact = call_of("reference")(*(x.double() for x in inputs))
            plain = _relative(call_of("reference")(*inputs), exact)
            _poison(device)
            ours = _relative(call_of("native")(*inputs), exact)
            allowed = 2 * plain + _slack(family, dtype, device) * _ROUNDING[dtype]
            if not ours <= allowed:
                failures[family].append(f"{label} {dtype}: error {ours:.1e}, allowed {allowed:.1e}")
    for rows, dim, k, metric in _neighbor_shapes(tiny) if "neighbors" in families else ():
        x, queries = _neighbor_inputs(rows, dim, seed)
        for q in (None, queries.to(device)):
            _poison(device)
            ours_v, ours_i = scan_fast.topk_neighbors(x.to(device), k, queries=q, metric=metric, impl="native")
            value, index = scan_fast.topk_neighbors(
                x, k, queries=None if q is None else queries, metric=metric, impl="reference"
            )
            if not (torch.equal(ours_i.cpu(), index) and torch.equal(ours_v.cpu(), value)):
                wrong = int((ours_i.cpu() != index).sum())
                failures["neighbors"].append(f"{rows}x{dim} k={k} {metric}: {wrong} of {index.numel()} differ")
    for count, source, side in _view_shapes(tiny) if "augment" in families else ():
        images, recipes = _view_inputs(count, source, side, seed)
        for dtype in VIEW_DTYPES:
            # Each image by itself on the CPU: what comes out depends neither on the device nor on the batch.
            alone = [_views(images[i : i + 1], recipes[i : i + 1], side, dtype) for i in range(count)]
            _poison(device)
            wrong = int((_views(images.to(device), recipes, side, dtype).cpu() != torch.cat(alone)).sum())
            if wrong:
                failures["augment"].append(f"{count}x{source}->{side} {dtype}: {wrong} values differ from the CPU's")
    return failures


def repeat(device: str, seed: int, tiny: bool, families: Sequence[str] = FAMILIES) -> dict[str, list[str]]:
    """Return, per family, what did not repeat in every bit."""
    failures: dict[str, list[str]] = {family: [] for family in families}
    for family, label, shape, upstream_shape, call_of in _gradient_cases(tiny):
        if family not in families:
            continue
        inputs = tuple(x.to(device) for x in _gradient_inputs(family, shape, upstream_shape, seed))
        first = call_of("native")(*inputs)
        for _ in range(3):
            _poison(device)
            if not all(torch.equal(a, b) for a, b in zip(first, call_of("native")(*inputs), strict=True)):
                failures[family].append(label)
                break
    for rows, dim, k, metric in _neighbor_shapes(tiny) if "neighbors" in families else ():
        x = _neighbor_inputs(rows, dim, seed)[0].to(device)
        first = scan_fast.topk_neighbors(x, k, metric=metric, impl="native")
        again = scan_fast.topk_neighbors(x, k, metric=metric, impl="native")
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            failures["neighbors"].append(f"{rows}x{dim} k={k} {metric}")
    for count, source, side in _view_shapes(tiny) if "augment" in families else ():
        images, recipes = _view_inputs(count, source, side, seed)
        first_view, again_view = (_views(images.to(device), recipes, side, torch.float32) for _ in range(2))
        if not torch.equal(first_view, again_view):
            failures["augment"].append(f"{count}x{source}->{side}")
    return failures


def graph(device: str, seed: int, tiny: bool, families: Sequence[str] = FAMILIES) -> dict[str, list[str]]:
    """Return, per family, what a graph of a call does not give on other inputs, or why there is no graph of it."""
    failures: dict[str, list[str]] = {family: [] for family in families if family != "augment"}

    def check(family: str, label: str, call: Call, first: Tensors, second: Tensors) -> None:
        expected = tuple(x.clone() for x in call(*second))
        inputs = tuple(x.clone() for x in first)
        try:
            replay, outputs = _recorded(call, inputs, device)
        except RuntimeError as error:
            failures[family].append(f"{label}: {str(error).splitlines()[0]}")
            return
        for x, value in zip(inputs, second, strict=True):
            x.copy_(value)
        for x in outputs():
            x.fill_(-1)
        replay()
        if not all(torch.equal(a, b) for a, b in zip(outputs(), expected, strict=True)):
            failures[family].append(label)

    for family, label, shape, upstream_shape, call_of in _gradient_cases(tiny):
        if family not in families:
            continue
        pair = (_gradient_inputs(family, shape, upstream_shape, s) for s in (seed, seed + 1))
        first, second = (tuple(x.to(device) for x in cpu) for cpu in pair)
        check(family, label, call_of("native"), first, second)
    for rows, dim, k, metric in _neighbor_shapes(tiny) if "neighbors" in families else ():
        x, y = (_neighbor_inputs(rows, dim, s)[0].to(device) for s in (seed, seed + 1))

        def search(z: Tensor, k: int = k, metric: str = metric) -> Tensors:
            return scan_fast.topk_neighbors(z, k, metric=metric, impl="native")

        check("neighbors", f"{rows}x{dim} k={k} {metric}", search, (x,), (y,))
    return failures


def _recorded(call: Call, inputs: Tensors, device: str) -> tuple[Callable[[], None], Callable[[], Tensors]]:
    """Record a call on these inputs; return what runs it again and what gives its outputs."""
    if device == "cpu":
        kept = [call(*inputs)]

        def run() -> None:
            kept[0] = call(*inputs)

        return run, lambda: kept[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        outputs = call(*inputs)

    def replay() -> None:
        recording.replay()
        torch.cuda.synchronize()

    return replay, lambda: outputs


def run_tiny(device: str, seed: int, family: str) -> None:
    """Run a family's operators once per tiny shape."""
    for name, _, shape, upstream_shape, call_of in _gradient_cases(tiny=True):
        if name == family:
            for dtype in (torch.float32, torch.bfloat16):
                cpu = _gradient_inputs(name, shape, upstream_shape, seed)
                call_of("native")(*(x.to(dtype).to(device) for x in cpu[:2]), cpu[2].to(device))
    if family == "neighbors":
        for rows, dim, k, metric in _neighbor_shapes(tiny=True):
            x, queries = (x.to(device) for x in _neighbor_inputs(rows, dim, seed))
            scan_fast.topk_neighbors(x, k, metric=metric, impl="native")
            scan_fast.topk_neighbors(x, k, queries=queries, metric=metric, impl="native")
    if family == "augment":
        for count, source, side in _view_shapes(tiny=True):
            images, recipes = _view_inputs(count, source, side, seed)
            for dtype in VIEW_DTYPES:
                _views(images.to(device), recipes, side, dtype)
    if device == "cuda":
        torch.cuda.synchronize()


VIEW_DTYPES = (torch.uint8, torch.float32, torch.bfloat16)


def _views(images: Tensor, recipes: Tensor, side: int, dtype: torch.dtype) -> Tensor:
    return augment(images, recipes, side, (0.017, 0.021, 0.019), (-2.1, -1.9, 0.3), dtype)


def _view_shapes(tiny: bool) -> list[tuple[int, int, int]]:
    """Number, side of the source, side of the view: a warp, a block, and a block without shared memory per image."""
    return [(9, 14, 11), (2, 30, 35)] if tiny else [(203, 32, 32), (17, 70, 48), (9, 96, 96), (3, 150, 130)]


def _view_inputs(count: int, source: int, side: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, and recipes of five operations each with boxes, mirroring and cutouts."""
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


def _neighbor_shapes(tiny: bool) -> list[tuple[int, int, int, str]]:
    if tiny:
        return [(70, 9, 3, "cosine"), (40, 33, 39, "dot")]
    return [(70, 9, 3, "cosine"), (1000, 128, 20, "cosine"), (3001, 70, 50, "dot"), (5000, 512, 20, "cosine")]


def _neighbor_inputs(rows: int, dim: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dim, generator=generator)
    x[rows // 2 : rows // 2 + 5] = x[0]  # duplicates: ties by index
    x[1, 0] = float("nan")
    return x, torch.randn(rows // 2 + 1, dim, generator=generator)


CHECKS = {"accuracy": accuracy, "repeat": repeat, "graph": graph}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("check", choices=(*CHECKS, "tiny"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--family", choices=FAMILIES, help="only this one")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 2**31)
    parser.add_argument("--small", action="store_true", help="only tiny shapes")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    if os.environ.get("SCAN_FAST_GPU_KERNELS") == "sm90" and options.family not in native.SM90_FAMILIES:
        raise SystemExit(f"the kernels for sm_90a were asked for, and {options.family} has none in this build")
    if options.check == "tiny":
        run_tiny(options.device, options.seed, options.family)
        return
    families = FAMILIES if options.family is None else (options.family,)
    failures = CHECKS[options.check](options.device, options.seed, options.small, families)
    for family, found in failures.items():
        print(json.dumps({"family": family, "passed": not found, "failures": found}))
    raise SystemExit(1 if any(failures.values()) else 0)


if __name__ == "__main__":
    main()
