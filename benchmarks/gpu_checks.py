"""Checks of the compiled kernels on a device, without pytest: ``python -m benchmarks.gpu_checks CHECK --device cuda``.

``accuracy``: fresh inputs (the seed is printed) and freed memory poisoned with NaN, so that an element nobody writes
shows; against float64, a kernel may err at most twice as much as plain PyTorch in the same precision, plus a few units
in the last place. ``repeat``: the same call twice gives the same bits. ``tiny``: every operator once on shapes that are
small and odd, for compute-sanitizer; it calls few operations of PyTorch's own. Prints one JSON line per family.
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

Tensors = tuple[Tensor, ...]
Call = Callable[..., Tensors]
FAMILIES = ("nt_xent", "scan_loss", "self_label", "neighbors")
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


def _loss_cases(tiny: bool) -> Iterator[tuple[str, str, tuple[int, ...], tuple[int, ...], Callable[[str], Call]]]:
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


def _loss_inputs(family: str, shape: tuple[int, ...], upstream_shape: tuple[int, ...], seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator)
    second = first + torch.randn(shape, generator=generator)
    if family == "self_label":
        # Rows stand out by 20 or not at all: none is near the threshold, where rounding would decide.
        rows, classes = shape
        label = torch.randint(0, classes, (rows,), generator=generator)
        first[torch.arange(rows), label] += 20.0 * (torch.rand(rows, generator=generator) < 0.7)
    return first, second, 1 + torch.rand(upstream_shape, generator=generator)


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
    for family, label, shape, upstream_shape, call_of in _loss_cases(tiny):
        if family not in families:
            continue
        for dtype in DTYPES:
            cpu = _loss_inputs(family, shape, upstream_shape, seed)
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
    return failures


def repeat(device: str, seed: int, tiny: bool, families: Sequence[str] = FAMILIES) -> dict[str, list[str]]:
    """Return, per family, what did not repeat in every bit."""
    failures: dict[str, list[str]] = {family: [] for family in families}
    for family, label, shape, upstream_shape, call_of in _loss_cases(tiny):
        if family not in families:
            continue
        inputs = tuple(x.to(device) for x in _loss_inputs(family, shape, upstream_shape, seed))
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
    return failures


def run_tiny(device: str, seed: int, family: str) -> None:
    """Run a family's operators once per tiny shape."""
    for name, _, shape, upstream_shape, call_of in _loss_cases(tiny=True):
        if name == family:
            for dtype in (torch.float32, torch.bfloat16):
                cpu = _loss_inputs(name, shape, upstream_shape, seed)
                call_of("native")(*(x.to(dtype).to(device) for x in cpu[:2]), cpu[2].to(device))
    if family == "neighbors":
        for rows, dim, k, metric in _neighbor_shapes(tiny=True):
            x, queries = (x.to(device) for x in _neighbor_inputs(rows, dim, seed))
            scan_fast.topk_neighbors(x, k, metric=metric, impl="native")
            scan_fast.topk_neighbors(x, k, queries=queries, metric=metric, impl="native")
    if device == "cuda":
        torch.cuda.synchronize()


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


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("check", choices=("accuracy", "repeat", "tiny"))
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
    check = accuracy if options.check == "accuracy" else repeat
    families = FAMILIES if options.family is None else (options.family,)
    failures = check(options.device, options.seed, options.small, families)
    for family, found in failures.items():
        print(json.dumps({"family": family, "passed": not found, "failures": found}))
    raise SystemExit(1 if any(failures.values()) else 0)


if __name__ == "__main__":
    main()
