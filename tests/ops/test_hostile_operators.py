"""Random wrong arguments, and memory that looks unusual, for every operator.

Wrong arguments: a call gives the reference's result or raises an error of Python, and never ends the process.
Unusual memory: elements at odd offsets and addresses, with strides, between guards, give the bits of fresh copies, and
neither guards nor inputs change. Results hold nothing of what their memory held before.

SCAN_FAST_FUZZ_EXAMPLES=1000 draws that many random examples per operator instead of few fixed ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operator_cases import CASES, Arguments, Draw, call, images
from torch import Tensor

from scan_fast.ops import native
from scan_fast.ops.convolution import is_usable

pytestmark = [
    pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
]

EXAMPLES = int(os.environ.get("SCAN_FAST_FUZZ_EXAMPLES", "20"))
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="SCAN_FAST_FUZZ_EXAMPLES" not in os.environ,
    suppress_health_check=list(HealthCheck),
)
RAISED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, MemoryError)
NEEDS_BF16 = {"conv2d", "conv2d_fork", "conv2d_forward", "conv2d_grad_input", "conv2d_grad_weight"}
OPERATORS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name in NEEDS_BF16 and native.is_available() and not is_usable("cpu"),
            reason="no bfloat16 convolutions on this processor",
        ),
    )
    for name in CASES
]
SEEDS = st.integers(0, 2**32)
INTEGERS = (-1, 0, 1, 2, 5, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**31), -(2**63))
NUMBERS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-300, 1e-45, 1e300, 3.4e38)


def fresh(value: Any) -> Any:
    """Return a copy in new memory, with the layout that operators expect of images."""
    if not isinstance(value, Tensor):
        return list(value) if isinstance(value, list) else value
    if value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last) and value.dtype != torch.uint8:
        return value.detach().clone(memory_format=torch.channels_last)
    return value.detach().clone(memory_format=torch.contiguous_format)


def copies(arguments: Arguments) -> Arguments:
    """Copy all arguments, but keep those that are one tensor together."""
    known: dict[int, Any] = {}
    return {name: known.setdefault(id(value), fresh(value)) for name, value in arguments.items()}


def words(tensor: Tensor) -> Tensor:
    """Return the elements' bits, in logical order."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().resolve_neg().contiguous().view(-1).view(kinds[tensor.itemsize])


def assert_same_bits(actual: list[Any], expected: list[Any]) -> None:
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        if isinstance(a, Tensor):
            assert a.shape == e.shape and a.dtype == e.dtype
            assert torch.equal(words(a), words(e))
        else:
            assert a == e


# ---- wrong arguments -------------------------------------------------------------------------------------------------


def _without_memory(t: Tensor, _: Draw) -> Tensor:
    t = t.clone(memory_format=torch.preserve_format)
    t.untyped_storage().resize_(t.untyped_storage().nbytes() // 2)
    return t


def _resized(t: Tensor, draw: Draw) -> Tensor:
    if t.ndim == 0:
        return t.expand(draw.integer(0, 3)).clone()
    sizes = list(t.shape)
    d = draw.integer(0, t.ndim - 1)
    sizes[d] = max(0, sizes[d] + (-1, 1, -sizes[d], 7)[draw.integer(0, 3)])
    resized = torch.zeros(sizes, dtype=t.dtype)
    return images(resized) if t.ndim == 4 and t.dtype != torch.uint8 else resized


def _quantized(t: Tensor, _: Draw) -> Tensor:
    return torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8)


def _converted(t: Tensor, draw: Draw) -> Tensor:
    kinds = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool, torch.complex64)
    return t.to(kinds[draw.integer(0, len(kinds) - 1)])


def _hostile_values(t: Tensor, draw: Draw) -> Tensor:
    t = t.clone(memory_format=torch.preserve_format)
    if t.numel() > 0:
        at = tuple(draw.integer(0, size - 1) for size in t.shape)
        limits = torch.finfo(t.dtype) if t.is_floating_point() else torch.iinfo(t.dtype)
        values = (float("nan"), float("inf"), -float("inf"), 1e4) if t.is_floating_point() else (-1, 0, 1, 127)
        t[at] = (*values, limits.min, limits.max)[draw.integer(0, 5)]
    return t


SPOILED: dict[str, Callable[[Tensor, Draw], object]] = {
    "none": lambda t, draw: None,
    "no dimension": lambda t, draw: t.flatten()[:1].reshape(()) if t.numel() else t,
    "flat": lambda t, draw: t.flatten(),
    "one more dimension": lambda t, draw: t[None],
    "transposed": lambda t, draw: t.transpose(0, -1) if t.ndim else t,
    "other size": _resized,
    "other dtype": _converted,
    "values": _hostile_values,
    "no memory": _without_memory,
    "one element everywhere": lambda t, draw: t.flatten()[:1].reshape([1] * t.ndim).expand(t.shape) if t.numel() else t,
    "meta": lambda t, draw: t.to("meta"),
    "sparse": lambda t, draw: t.to_sparse(),
    "quantized": _quantized,
    "negative bit": lambda t, draw: torch._neg_view(t) if t.is_floating_point() else t,
    "zeros without memory": lambda t, draw: torch._efficientzerotensor(t.shape, dtype=t.dtype),
    "requires grad": lambda t, draw: t.detach().requires_grad_() if t.is_floating_point() else t,
    "a list": lambda t, draw: t.tolist(),
}


def spoil(value: Any, draw: Draw, way: str) -> Any:
    """Return a wrong value of an argument, or sometimes another right one."""
    if isinstance(value, Tensor):
        return SPOILED[way](value, draw)
    if isinstance(value, bool):
        return (not value, None, 2)[draw.integer(0, 2)]
    if isinstance(value, int):
        return INTEGERS[draw.integer(0, len(INTEGERS) - 1)]
    if isinstance(value, float):
        return NUMBERS[draw.integer(0, len(NUMBERS) - 1)]
    if isinstance(value, torch.dtype):
        kinds = (torch.float64, torch.float16, torch.int8, torch.complex64, torch.bool, torch.qint8, None, 99)
        return kinds[draw.integer(0, len(kinds) - 1)]
    if isinstance(value, list):
        choices = INTEGERS if isinstance(value[0], int) else NUMBERS
        changed: list[Any] = list(value)
        changed[draw.integer(0, len(value) - 1)] = choices[draw.integer(0, len(choices) - 1)]
        return (changed, value[:-1], [*value, value[0]], [])[draw.integer(0, 3)]
    return torch.zeros(draw.integer(0, 3))  # an optional tensor that was left out


def plain(arguments: Arguments) -> bool:
    """Return whether arguments are what a careful caller passes: dense tensors of moderate numbers."""
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    numbers = [value for value in arguments.values() if isinstance(value, float)]
    # Without eps, PyTorch's batch normalisation refuses to train; the operator's statistics are defined.
    return arguments.get("eps") != 0 and all(number == 0 or 1e-4 <= abs(number) <= 1e4 for number in numbers) and all(
        t.layout == torch.strided and t.device.type == "cpu" and not t.is_complex() and not t.is_quantized
        and (not t.is_floating_point() or bool(t.double().abs().le(1e4).all()))
        for t in tensors
    )  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
@SETTINGS
@given(seed=SEEDS, ways=st.lists(st.sampled_from(sorted(SPOILED)), min_size=1, max_size=2))
def test_wrong_arguments_raise(name: str, seed: int, ways: list[str]) -> None:
    draw = Draw(seed)
    case = CASES[name]
    arguments = case.make(draw)
    # Last, because PyTorch's own operations would read past the end of the memory.
    ways = sorted(ways, key=lambda way: way == "no memory")
    for way in ways:
        spoiled = list(arguments)[draw.integer(0, len(arguments) - 1)]
        try:
            arguments[spoiled] = spoil(arguments[spoiled], draw, way)
        except RAISED:  # PyTorch itself cannot make it
            return
    kept = copies(arguments) if "no memory" not in ways and plain(arguments) else None
    try:
        results = call(name, arguments)
    except RAISED:
        return
    if kept is None or any(isinstance(r, Tensor) and r.is_meta for r in results):
        return
    assert_same_bits(results, call(name, copies(kept)))
    if case.reference is None:
        return
    for actual, expected in zip(results, case.reference(copies(kept)), strict=False):
        assert actual.shape == expected.shape
        if name == "topk_neighbors":
            assert torch.equal(actual, expected)
        else:
            torch.testing.assert_close(
                actual.double(), expected.double(), rtol=case.tolerance, atol=case.tolerance, equal_nan=True
            )


# ---- unusual memory --------------------------------------------------------------------------------------------------


class Guarded:
    """A tensor between guard elements, somewhere in a block of bytes."""

    def __init__(self, tensor: Tensor, draw: Draw, *, updated: bool) -> None:
        size = tensor.itemsize
        spread = 1 if tensor.ndim == 4 or updated else draw.integer(1, 2)  # images must be channels-last
        order = tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 and tensor.dtype != torch.uint8 else tensor
        # Bytes before the first element: whole elements, and for what is only read any number of bytes.
        before = 16 * 4 + size * draw.integer(1, 15) + (0 if updated else draw.integer(0, size - 1))
        self.block = bytearray(b"\xff" * (before + (order.numel() * spread + 16) * size))
        elements = order.numel() * spread
        flat = torch.frombuffer(self.block, dtype=tensor.dtype, offset=before, count=max(1, elements))
        view = flat[:elements:spread].view(order.shape) if elements else flat[:0].view(order.shape)
        view.copy_(order)
        self.view = view.permute(0, 3, 1, 2) if order is not tensor else view
        self.content = bytes(self.block)

    def unchanged(self) -> bool:
        return bytes(self.block) == self.content

    def guards_unchanged(self) -> bool:
        """Return whether the bytes around an updated tensor are as before."""
        first = self.view.data_ptr() - torch.frombuffer(self.block, dtype=torch.uint8).data_ptr()
        last = first + self.view.numel() * self.view.itemsize
        now = bytes(self.block)
        return now[:first] == self.content[:first] and now[last:] == self.content[last:]


@pytest.mark.parametrize("name", OPERATORS)
@SETTINGS
@given(seed=SEEDS)
def test_unusual_memory_gives_the_same_bits(name: str, seed: int) -> None:
    draw = Draw(seed)
    arguments = CASES[name].make(draw)
    updated = CASES[name].updated
    normal = copies(arguments)
    expected = call(name, normal)
    guarded = {
        key: Guarded(value, draw, updated=key in updated)
        for key, value in arguments.items()
        if isinstance(value, Tensor)
    }
    actual = call(name, {key: guarded[key].view if key in guarded else value for key, value in arguments.items()})
    assert_same_bits(actual, expected)
    for key, guard in guarded.items():
        if key in updated:
            assert guard.guards_unchanged(), key
            assert_same_bits([guard.view], [normal[key]])
        else:
            assert guard.unchanged(), key


@contextmanager
def filled_memory() -> Iterator[None]:
    """Fill memory that torch.empty returns with NaN, or with the largest integer, as PyTorch does by default."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert bool(torch.empty(3).isnan().all())
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def poison_pool(results: list[Tensor]) -> None:
    """Fill the memory that waits for results of these sizes with NaN."""
    native._C.release_pooled()
    waiting = [native._C.empty_large([-(-r.nbytes // 4)], torch.float32).fill_(float("nan")) for r in results]
    del waiting
    assert native._C.pooled_bytes() > 0


@pytest.mark.parametrize("name", OPERATORS)
@SETTINGS
@given(seed=SEEDS)
def test_results_hold_nothing_of_old_memory(name: str, seed: int) -> None:
    arguments = CASES[name].make(Draw(seed))
    expected = call(name, copies(arguments))
    # Leaves NaN in the scratch memory that a thread keeps for the next call.
    dirty = copies(arguments)
    for value in dirty.values():
        if isinstance(value, Tensor) and value.is_floating_point():
            value.fill_(float("nan"))
    call(name, dirty)
    with filled_memory():
        actual = call(name, copies(arguments))
    assert_same_bits(actual, expected)


def test_large_results_hold_nothing_of_old_memory() -> None:
    logits = Draw(0).normal(2, 300, 1000)
    weak, strong = logits[0], logits[1]
    loss_arguments = (None, None, None, logits, logits.flip(1), torch.rand(2, 1000), torch.rand(2, 300, 6), 2.0)
    z = Draw(1).normal(300, 1000)
    for operation in (
        lambda: torch.ops.scan_fast.scan_loss_backward(torch.ones(2), *loss_arguments[1:]),
        lambda: torch.ops.scan_fast.self_label_backward(
            torch.ones(()), strong, weak.argmax(1).int(), torch.ones(300), torch.ones(300, 2)
        ),
        lambda: torch.ops.scan_fast.nt_xent_forward(z, z.flip(0), 0.1, True, 0, 300),
        lambda: torch.ops.scan_fast.augment(
            Draw(2).bytes(40, 64, 64, 3), None, torch.tensor([[0, 0, 64, 64, *[0] * 5]] * 40, dtype=torch.int32), 64,
            [0.01] * 3, [0.0] * 3, torch.float32,
        ),
    ):  # fmt: skip
        native._C.release_pooled()
        first = operation()
        expected = [t.clone() for t in (first if isinstance(first, tuple | list) else [first])]
        del first
        poison_pool(expected)
        again = operation()
        assert_same_bits(list(again) if isinstance(again, tuple | list) else [again], expected)
