"""Peak rates of the machine, measured with library calls, and the time that a given amount of work needs at them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from scan_fast.ops import native


@dataclass(frozen=True)
class Work:
    """Work that no implementation of an algorithm avoids.

    Attributes:
        flops: multiplications and additions in matrix products.
        bytes: traffic with main memory: inputs read once per pass, outputs written once.
        exponentials: evaluations of exp.
        unit: the kind of product, a key of :func:`measure_ceilings`.
    """

    flops: float
    bytes: float
    exponentials: float = 0.0
    unit: str = "gemm_float32"


def limit(work: Work, ceilings: dict[str, float]) -> tuple[float, str]:
    """Return the least seconds for some work, and its bound: "products", "memory" or "exponentials".

    The three may overlap, so the limit is the longest of them. Exponentials have a ceiling on GPUs only.
    """
    times = {"products": work.flops / ceilings[work.unit], "memory": work.bytes / ceilings["copy_bytes"]}
    if "exp" in ceilings:
        times["exponentials"] = work.exponentials / ceilings["exp"]
    bound = max(times, key=lambda name: times[name])
    return times[bound], bound


def best_seconds(body: Callable[[], object], device: str, repeats: int, enough: float = 20.0) -> float:
    """Return the shortest time of at most ``repeats`` calls, after one that is not timed.

    After ``enough`` seconds no further call begins, but one is always timed.
    """

    def once() -> float:
        if device == "cpu":
            begin = time.perf_counter()
            body()
            return time.perf_counter() - begin
        begin_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin_event.record()
        body()
        end_event.record()
        end_event.synchronize()
        return float(begin_event.elapsed_time(end_event)) / 1e3

    begin = time.monotonic()
    once()
    best = once()
    for _ in range(repeats - 1):
        if time.monotonic() - begin > enough:
            break
        best = min(best, once())
    return best


def _best_rate(amount: float, body: Callable[[], object], device: str, repeats: int) -> float:
    return amount / best_seconds(body, device, repeats)


def _product_rate(dtype: torch.dtype, n: int, device: str, repeats: int) -> float:
    """Return the rate of a product of two n x n matrices, or of smaller ones if it would take more than a second.

    PyTorch's bfloat16 products take a thousand times longer on a processor without instructions for them.
    """
    rate = 0.0
    for size in (n // 8, n // 4, n // 2, n):
        if rate and 2.0 * size**3 / rate > 1.0:
            break
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> object:
            return torch.mm(a, b, out=out)

        rate = _best_rate(2.0 * size**3, product, device, repeats if size == n else 1)
    return rate


@functools.cache
def measure_ceilings(device: str, quick: bool = False) -> dict[str, float]:
    """Measure the best rates over several runs, on random data, once per process.

    Returns:
        ``gemm_float32`` and ``gemm_bfloat16`` (and ``gemm_float16`` on CUDA) in flops per second: of a large matrix
        product, or on a CPU of a convolution if that is faster, as in float32 on AMD's; ``tiles_bfloat16`` on
        a CPU with AMX: products of tiles in the first-level cache, an upper bound of all products; ``copy_bytes`` in
        bytes read plus written per second; and on CUDA ``exp``, evaluations per second by the number of units and the
        highest clock (16 per clock and multiprocessor).
    """
    n = (8192 if device == "cuda" else 2048) // (4 if quick else 1)
    repeats = 3 if quick else 8
    rates: dict[str, float] = {}
    dtypes = (torch.float32, torch.bfloat16, *((torch.float16,) if device == "cuda" else ()))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for dtype in dtypes:
            rates[f"gemm_{str(dtype).removeprefix('torch.')}"] = _product_rate(dtype, n, device, repeats)
    finally:
        torch.set_float32_matmul_precision(before)
    if device == "cpu":
        for dtype in dtypes:
            name = f"gemm_{str(dtype).removeprefix('torch.')}"
            # A slower bfloat16 product means that there are no instructions for it; then a convolution takes minutes.
            if rates[name] >= rates["gemm_float32"]:
                rates[name] = max(rates[name], measure_convolution(device, dtype))
    if device == "cpu" and native.is_available() and (tiles := native.amx_peak_rate()) > 0:
        # Library products reach half of it; ours can exceed that.
        rates["tiles_bfloat16"] = tiles * torch.get_num_threads()
    size = ((4 << 30) if device == "cuda" else (256 << 20)) // (16 if quick else 1)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates["copy_bytes"] = _best_rate(2.0 * size, lambda: target.copy_(source), device, repeats)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        clock = float(getattr(properties, "clock_rate", 0)) * 1e3  # kHz
        if clock:
            rates["exp"] = 16.0 * properties.multi_processor_count * clock
    return rates


@functools.cache
def measure_convolution(device: str, dtype: torch.dtype) -> float:
    """Measure the best rate of a 3x3 convolution, the main work of a ResNet, in flops per second, once per process.

    Forward only, 128 to 128 channels at 16x16 in channels-last layout: the middle of a ResNet-18 on 32x32 images.
    """
    batch, channels, side = (1024 if device == "cuda" else 64), 128, 16
    layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    layer.to(memory_format=torch.channels_last)
    x = torch.randn(batch, channels, side, side, device=device).to(dtype)
    x = x.to(memory_format=torch.channels_last)
    amount = 2.0 * batch * side * side * channels * channels * 9
    with torch.no_grad():
        return _best_rate(amount, lambda: layer(x), device, 20)
