"""The self-label loss: compiled kernel and reference against float64, on every available device."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast import SelfLabelLoss, self_label_loss
from scan_fast.ops import native, reference
from scan_fast.ops.dispatch import Impl

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRADIENT_RTOL = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SHAPES = [(1, 1), (1, 2), (7, 10), (7000, 9), (130, 33), (65, 100), (9, 1000), (33, 1025), (3, 5000)]


def views(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weak logits, about half of whose rows are confident, and strong logits."""
    generator = torch.Generator().manual_seed(seed)
    weak = torch.randn(shape, generator=generator)
    rows = torch.arange(0, shape[0], 2)
    weak[rows, torch.randint(shape[1], (len(rows),), generator=generator)] += 25.0
    strong = torch.randn(shape, generator=generator) * 3
    return weak.to(dtype).to(device), strong.to(dtype).to(device)


def check(weak: torch.Tensor, strong: torch.Tensor, threshold: float = 0.9, balance: bool = True) -> int:
    s, s64 = strong.detach().clone().requires_grad_(), strong.detach().double().requires_grad_()
    loss, count = self_label_loss(weak, s, threshold, balance=balance, impl="native")
    expected, expected_count = reference.self_label_loss(weak.double(), s64, threshold, balance)
    assert loss.dtype == torch.float32 and count.dtype == torch.int64
    assert count == expected_count
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(loss, s, torch.tensor(-0.7, device=s.device))
    (want,) = torch.autograd.grad(expected, s64, torch.tensor(-0.7, device=s.device).double())
    assert gradient.dtype == strong.dtype
    smallest = 6e-8 if strong.dtype == torch.float16 else 0.0
    torch.testing.assert_close(
        gradient.double(),
        want,
        rtol=GRADIENT_RTOL[strong.dtype],
        atol=float(want.abs().max()) * 3e-6 + smallest,
    )
    return int(count)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, balance: bool, device: str) -> None:
    assert check(*views(shape, dtype, device=device), balance=balance) > 0


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    classes=st.integers(1, 70),
    threshold=st.sampled_from([0.0, 0.3, 0.99]),
    balance=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_float64_at_any_shape(
    rows: int, classes: int, threshold: float, balance: bool, dtype: torch.dtype
) -> None:
    check(*views((rows, classes), dtype, seed=rows * 71 + classes), threshold, balance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 50])
def test_few_classes(rows: int, dtype: torch.dtype) -> None:
    """One row per lane up to 32 classes, one row at a time from 33 on; row counts around the vector widths."""
    for classes in range(1, 34):
        weak, strong = views((rows, classes), dtype, seed=classes)
        weak[-1, :2] = 30.0  # a tie: the label is the first class, and the confidence is one half
        if rows > 20:
            weak[:16] = 0.0  # a vector of rows without a confident one, if there is more than one class
        check(weak, strong)
        check(weak, strong, threshold=0.3, balance=False)


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_golden_values(impl: Impl) -> None:
    """The values equal those of the original implementation."""
    weak, strong = (
        s * torch.sin(torch.arange(40, dtype=torch.float64) * k).view(8, 5).float() for s, k in ((9, 0.7), (3, 1.3))
    )
    loss, count = self_label_loss(weak, strong, 0.9, impl=impl)
    assert count == 4 and loss.item() == pytest.approx(2.3350735, abs=1e-6)
    loss, _ = self_label_loss(weak, strong, 0.9, balance=False, impl=impl)
    assert loss.item() == pytest.approx(3.3426452, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", ["native", "reference"])
def test_no_confident_row(impl: Impl, device: str) -> None:
    weak, strong = torch.zeros(5, 4, device=device), torch.ones(5, 4, device=device, requires_grad=True)
    loss, count = self_label_loss(weak, strong, 0.5, impl=impl)
    assert loss == 0 and count == 0
    loss.backward()
    assert strong.grad is not None
    assert torch.equal(strong.grad, torch.zeros_like(strong))


@pytest.mark.parametrize("device", DEVICES)
def test_the_threshold_is_strict_and_ties_go_to_the_first_class(device: str) -> None:
    weak = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, -torch.inf]], device=device)
    strong = torch.tensor([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]], device=device)
    loss, count = self_label_loss(weak, strong, 0.5, impl="native")
    assert count == 1
    assert loss.item() == pytest.approx(math.log1p(math.e), abs=1e-6)
    assert self_label_loss(weak, strong, 1.0, impl="native")[1] == 0
    loss, count = self_label_loss(weak, strong, 0.0, balance=False, impl="native")
    losses = [math.log1p(math.exp(-2.0)), math.log1p(math.exp(3.0)), math.log1p(math.e)]  # all three of class 0
    assert count == 3 and loss.item() == pytest.approx(sum(losses) / 3, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [5, 40, 1100])
def test_unconfident_rows_may_hold_anything(classes: int, device: str) -> None:
    weak, strong = views((8, classes), device=device)
    clean, _ = self_label_loss(weak, strong, 0.9, impl="native")
    strong[1], strong[3, 0], weak[5] = torch.nan, torch.inf, torch.nan
    strong.requires_grad_()
    loss, count = self_label_loss(weak, strong, 0.9, impl="native")
    assert torch.equal(loss, clean) and count == 4
    loss.backward()
    assert strong.grad is not None
    assert strong.grad.isfinite().all() and (strong.grad[1::2] == 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_classes(dtype: torch.dtype, device: str) -> None:
    weak, strong = views((9, 50), dtype, device=device)
    labels = set(weak.float().argmax(1).tolist())
    masked = next(c for c in range(50) if c not in labels)
    weak[:, masked] = strong[:, masked] = -torch.inf
    check(weak, strong)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device: str) -> None:
    weak, strong = views((40, 60), device=device)
    check(weak.T, strong.T, 0.1)
    check(weak[::3, 1::2], strong[::3, 1::2], 0.1)
    check(weak[:1].expand(8, 60), strong[:1].expand(8, 60))


def test_no_gradient_flows_into_the_weak_view() -> None:
    weak, strong = views((12, 6))
    weak.requires_grad_()
    assert not self_label_loss(weak, strong, 0.5, impl="native")[0].requires_grad
    strong.requires_grad_()
    loss, count = self_label_loss(weak, strong, 0.5, impl="native")
    assert not count.requires_grad
    loss.backward()
    assert weak.grad is None and strong.grad is not None


def test_graph_can_be_used_again() -> None:
    weak, strong = views((20, 10))
    strong.requires_grad_()
    loss, _ = self_label_loss(weak, strong, 0.9, impl="native")
    (first,) = torch.autograd.grad(loss, strong, retain_graph=True)
    (again,) = torch.autograd.grad(3 * loss, strong)
    torch.testing.assert_close(3 * first, again)


def test_double_backward_raises() -> None:
    weak, strong = views((6, 4))
    strong.requires_grad_()
    loss, _ = self_label_loss(weak, strong, 0.9, impl="native")
    (gradient,) = torch.autograd.grad(loss, strong, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(4000, 10), (300, 1000)], ids=str)
def test_same_input_same_bits(shape: tuple[int, ...], device: str) -> None:
    weak, strong = views(shape, device=device)

    def run() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        s = strong.clone().requires_grad_()
        loss, count = self_label_loss(weak, s, 0.9, impl="native")
        return loss, count, torch.autograd.grad(loss, s)[0]

    expected = run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_compiles_without_graph_breaks() -> None:
    def step(weak: torch.Tensor, strong: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, count = self_label_loss(weak + 0, strong * 2, 0.9, impl="native")
        return loss * 3, count + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    weak, strong = views((12, 7))
    strong.requires_grad_()
    (loss, count), (expected, expected_count) = compiled(weak, strong), step(weak, strong)
    assert torch.equal(loss, expected) and torch.equal(count, expected_count)
    torch.testing.assert_close(torch.autograd.grad(loss, strong), torch.autograd.grad(expected, strong))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device: str) -> None:
    weak, strong = views((7, 5), device=device)
    ops = torch.ops.scan_fast
    torch.library.opcheck(ops.self_label_forward, (weak, strong, 0.9, True))
    loss, _, target, row_weight, row_stats = ops.self_label_forward(weak, strong, 0.9, True)
    torch.library.opcheck(ops.self_label_backward, (loss, strong, target, row_weight, row_stats))
    torch.library.opcheck(ops.self_label, (weak, strong.requires_grad_(), 0.9, True))


def test_float64_goes_through_the_reference() -> None:
    weak, strong = (x.double() for x in views((5, 4)))
    strong.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: self_label_loss(weak, s, 0.9)[0], (strong,))
    with pytest.raises(ValueError, match="float64"):
        self_label_loss(weak, strong, 0.9, impl="native")


def test_wrong_input_raises() -> None:
    a = torch.zeros(4, 3)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((torch.zeros(3), torch.zeros(3)), r"weak must be logits \(B, C\), got shape \(3,\)"),
        ((torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)), "weak must be logits"),
        ((torch.zeros(0, 3), torch.zeros(0, 3)), "weak must not be empty"),
        ((a, torch.zeros(4, 2)), r"strong must have the shape of weak, \(4, 3\), got \(4, 2\)"),
        ((a, a.half()), "strong must have the dtype of weak"),
        ((a, a.to("meta")), "strong must be on the device of weak"),
        ((a.long(), a.long()), "weak must be floating-point"),
        ((a, a, 1.5), r"threshold must be in \[0, 1\], got 1.5"),
        ((a, a, math.nan), "threshold"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            self_label_loss(*arguments)


def test_module_returns_only_the_loss() -> None:
    weak, strong = views((6, 4))
    assert torch.equal(SelfLabelLoss(0.9)(weak, strong), self_label_loss(weak, strong, 0.9)[0])
    weak = 20 * torch.nn.functional.one_hot(torch.tensor([0, 0, 0, 0, 0, 1]), 4).float()
    unbalanced = SelfLabelLoss(0.9, balance=False)(weak, strong)
    assert torch.equal(unbalanced, self_label_loss(weak, strong, 0.9, balance=False)[0])
    assert not torch.equal(unbalanced, SelfLabelLoss(0.9)(weak, strong))
