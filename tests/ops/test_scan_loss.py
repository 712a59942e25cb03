"""The SCAN loss: compiled kernel and reference against float64, on every available device."""

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast import SCANLoss, scan_loss
from scan_fast.ops import native, reference
from scan_fast.ops.dispatch import Impl

needs_native = pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built")
pytestmark = needs_native
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The loss is float32 for every input type; a gradient is rounded once to the input type.
GRADIENT_RTOL = {torch.float32: 3e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}
SHAPES = [
    (1, 1),
    (1, 2),
    (7, 10),
    (130, 33),
    (3, 7, 1),
    (2, 130, 10),
    (2, 5000, 10),
    (65, 100),
    (9, 1000),
    (33, 1025),
    (3, 5000),
]


def logits(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    scale: float = 3.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)


def oracle(
    anchors: torch.Tensor, neighbors: torch.Tensor, entropy_weight: float, upstream: list[torch.Tensor]
) -> tuple[list[torch.Tensor], tuple[torch.Tensor, ...]]:
    """Return values and gradients by autograd through the reference, in float64."""
    a, n = (x.detach().double().requires_grad_() for x in (anchors, neighbors))
    heads = (a, n) if a.ndim == 3 else (a[None], n[None])
    values = [v if a.ndim == 3 else v[0] for v in reference.scan_loss(*heads, entropy_weight)]
    return values, torch.autograd.grad(values, (a, n), [u.double() for u in upstream])


def check(anchors: torch.Tensor, neighbors: torch.Tensor, entropy_weight: float = 5.0, seed: int = 3) -> None:
    a, n = (x.detach().clone().requires_grad_() for x in (anchors, neighbors))
    values = scan_loss(a, n, entropy_weight, impl="native")
    upstream = [logits(v.shape, seed=seed + i, scale=1.0, device=a.device) for i, v in enumerate(values)]
    gradients = torch.autograd.grad(values, (a, n), upstream)
    expected, expected_gradients = oracle(anchors, neighbors, entropy_weight, upstream)
    for value, want in zip(values, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), want, rtol=2e-6, atol=2e-6)
    for gradient, want in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == anchors.dtype and gradient.shape == anchors.shape
        rtol = GRADIENT_RTOL[anchors.dtype]
        smallest = 6e-8 if anchors.dtype == torch.float16 else 0.0
        torch.testing.assert_close(
            gradient.double(),
            want,
            rtol=rtol,
            atol=float(want.abs().max()) * 3e-6 + 1e-6 / anchors.shape[-2] + smallest,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(logits(shape, dtype, seed=1, device=device), logits(shape, dtype, seed=2, device=device))


@settings(max_examples=40, deadline=None)
@given(
    heads=st.integers(1, 3),
    rows=st.integers(1, 40),
    classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
def test_matches_float64_at_any_shape(heads: int, rows: int, classes: int, scale: float, dtype: torch.dtype) -> None:
    shape = (heads, rows, classes)
    check(logits(shape, dtype, scale, seed=rows), logits(shape, dtype, scale, seed=classes + 100))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 50])
def test_few_classes(rows: int, dtype: torch.dtype) -> None:
    """One row per lane up to 32 classes, one row at a time from 33 on; row counts around the vector widths."""
    for classes in range(1, 34):
        a, n = (logits((2, rows, classes), dtype, seed=classes + s) for s in (1, 2))
        a[0, rows // 2, 0] += 150.0  # with more than one class, <p, q> underflows in this row alone
        n[0, rows // 2, classes - 1] += 150.0
        if classes > 2:
            a[1, -1, 1] = -torch.inf
        check(a, n)


@pytest.mark.parametrize("rows", [5, 16, 40])
def test_a_bad_row_spoils_its_own_gradient_only(rows: int) -> None:
    for classes in (1, 10, 16, 17, 33):
        a, n = logits((rows, classes), seed=1), logits((rows, classes), seed=2)
        n[rows - 2, 0] = torch.nan
        a.requires_grad_(), n.requires_grad_()
        gradients = torch.autograd.grad(scan_loss(a, n, impl="native")[0], (a, n), torch.ones(()))
        rest = torch.arange(rows) != rows - 2
        for gradient in gradients:
            assert gradient[rest].isfinite().all() and gradient[rows - 2].isnan().any()


@pytest.mark.parametrize("impl", ["native", "reference"])
def test_golden_values(impl: Impl) -> None:
    """The values equal those of the original implementation."""
    a, n = (3 * torch.sin(torch.arange(40, dtype=torch.float64) * k).view(8, 5).float() for k in (0.7, 1.3))
    total, consistency, entropy = scan_loss(a, n, 5.0, impl=impl)
    assert total.item() == pytest.approx(-5.6649861, abs=1e-6)
    assert consistency.item() == pytest.approx(2.1418848, abs=1e-6)
    assert entropy.item() == pytest.approx(1.5613742, abs=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [5, 40, 1100, 4200])
@pytest.mark.parametrize("size", [40.0, 200.0, 3e4])
def test_confident_rows_that_disagree_keep_their_gradient(size: float, classes: int, device: str) -> None:
    """<p, q> underflows in float32, but the loss is exact and its gradient brings the two predictions together."""
    a, n = (torch.zeros(4, classes, device=device) for _ in range(2))
    a[:, 0] = size
    n[:, 1] = size
    n[0] = a[0]
    check(a, n, entropy_weight=0.5)
    a.requires_grad_()
    consistency = scan_loss(a, n, impl="native")[1]
    consistency.backward()
    assert consistency.item() == pytest.approx(0.75 * (size - math.log(2)), rel=1e-4)
    assert a.grad is not None
    assert (a.grad[1:, 1] < -0.1).all()  # upward for the neighbour's class


@pytest.mark.parametrize("impl", ["native", "reference"])
@pytest.mark.parametrize("exponent", [-2, -8, -11, -13, -16, -20, -38])
def test_a_binary_cross_entropy_loses_the_gradient_of_confident_rows_that_disagree(exponent: int, impl: Impl) -> None:
    """Its backward pass divides by max(s (1 - s), 1e-12), not by s (1 - s), so the gradient falls with s below that."""
    size = -exponent * math.log(10) + math.log(2)
    a, n = torch.tensor([[size, 0.0]], requires_grad=True), torch.tensor([[0.0, size]])
    own = torch.autograd.grad(scan_loss(a, n, 0.0, impl=impl)[1], a)[0]
    similarity = (a.softmax(dim=1) * n.softmax(dim=1)).sum()
    s = similarity.item()
    assert math.log10(s) == pytest.approx(exponent, abs=0.03)
    loss = torch.nn.functional.binary_cross_entropy(similarity, torch.ones(()))
    assert loss.item() == pytest.approx(-math.log(s), rel=1e-5)  # the loss itself is right
    theirs = torch.autograd.grad(loss, a)[0]
    kept = min(1.0, s * (1 - s) / 1e-12)
    assert torch.allclose(theirs, own * kept, rtol=1e-2, atol=0)
    assert own.abs().min() > 0.45


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", [6, 50, 1100, 4200])
def test_masked_classes(classes: int, dtype: torch.dtype, device: str) -> None:
    a, n = (logits((9, classes), dtype, seed=s, device=device) for s in (1, 2))
    a[:, 3] = -torch.inf
    n[:, 4] = -torch.inf
    a[2, 0] = n[2, 0] = -torch.inf
    check(a, n)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets(offset: float) -> None:
    a, n = logits((33, 20), seed=1) + offset, logits((33, 20), seed=2) - offset
    check(a, n)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("classes", [5, 40, 1100])
def test_nan_and_inf_stay_visible(classes: int, device: str) -> None:
    for bad in (torch.nan, torch.inf):
        a, n = logits((3, classes), seed=1, device=device), logits((3, classes), seed=2, device=device)
        a[1, 2] = bad
        assert all(v.isnan() for v in scan_loss(a, n, impl="native"))
        assert all(scan_loss(n, n, impl="native")[i].isfinite() for i in range(3))
        _, consistency, entropy = scan_loss(n, a, impl="native")
        assert consistency.isnan() and entropy.isfinite()
    # No class is possible for both views: the loss is infinite, as it should be.
    a, n = (torch.full((1, classes), -torch.inf, device=device) for _ in range(2))
    a[0, 0] = n[0, 1] = 0.0
    assert scan_loss(a, n, impl="native")[1] == torch.inf


def test_a_class_without_images() -> None:
    """A mean prediction below 1e-8 is clamped and has no gradient."""
    a, n = logits((16, 12), seed=1), logits((16, 12), seed=2)
    a[:, 5] = -60.0
    check(a, n)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_do_not_matter(device: str) -> None:
    base = logits((10, 40, 24), seed=5, device=device)
    a, n = base.transpose(0, 1)[:, ::2, 1::3], base.flip(0).transpose(0, 1)[:, ::2, 1::3]
    check(a, n)
    expanded = logits((1, 8), seed=6, device=device).expand(12, 8)
    check(expanded, logits((12, 8), seed=7, device=device))
    scalar = logits((6, 4), seed=1, device=device).requires_grad_()
    totals = scan_loss(scalar.expand(3, 6, 4), scalar.expand(3, 6, 4), impl="native")[0]
    (gradient,) = torch.autograd.grad(totals, scalar, torch.ones(1, device=device).expand(3))  # stride 0 upstream
    assert gradient.isfinite().all()


def test_graph_can_be_used_again() -> None:
    a, n = (logits((20, 10), seed=s).requires_grad_() for s in (1, 2))
    total, consistency, entropy = scan_loss(a, n, impl="native")
    first = torch.autograd.grad(total, (a, n), retain_graph=True)
    again = torch.autograd.grad(total, (a, n), retain_graph=True)
    parts = torch.autograd.grad(consistency - 2.0 * entropy, (a, n))
    for x, y, z in zip(first, again, parts, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(x, z)


def test_only_one_input_needs_a_gradient() -> None:
    a, n = logits((20, 10), seed=1), logits((20, 10), seed=2)
    both = [x.clone().requires_grad_() for x in (a, n)]
    expected = torch.autograd.grad(scan_loss(both[0], both[1], impl="native")[0], both)
    for i, x in enumerate((a, n)):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(scan_loss(a, n, impl="native")[0], x)
        assert torch.equal(gradient, expected[i])
        x.requires_grad_(False)
    assert not scan_loss(a, n, impl="native")[0].requires_grad


def test_double_backward_raises() -> None:
    a, n = (logits((6, 4), seed=s).requires_grad_() for s in (1, 2))
    (gradient,) = torch.autograd.grad(scan_loss(a, n, impl="native")[0], a, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(300, 10), (2, 5000, 10), (4, 900, 37), (3, 40, 1500)], ids=str)
def test_same_input_same_bits(shape: tuple[int, ...], device: str) -> None:
    def run() -> list[torch.Tensor]:
        a, n = (logits(shape, seed=s, device=device).requires_grad_() for s in (1, 2))
        values = scan_loss(a, n, impl="native")
        return [*values, *torch.autograd.grad(values[0].sum(), (a, n))]

    expected = run()
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    def step(a: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        total, consistency, entropy = scan_loss(a * 2, n + 1, 3.0, impl="native")
        return (total + 0.5 * consistency * entropy).sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in ((2, 12, 7), (2, 20, 7)):
        a, n = (logits(shape, seed=s).requires_grad_() for s in (1, 2))
        loss, expected = compiled(a, n), step(a, n)
        torch.testing.assert_close(loss, expected)
        for x, y in zip(torch.autograd.grad(loss, (a, n)), torch.autograd.grad(expected, (a, n)), strict=True):
            torch.testing.assert_close(x, y)


def test_autocast_takes_16_bit_logits() -> None:
    weight = logits((10, 16), scale=1.0).requires_grad_()
    x = logits((32, 16), seed=4)
    with torch.autocast("cpu", torch.bfloat16):
        a = x @ weight.T
        total = scan_loss(a, a.flip(0), impl="native")[0]
    assert a.dtype == torch.bfloat16 and total.dtype == torch.float32
    total.backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5)])
@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(shape: tuple[int, ...], device: str) -> None:
    a, n = (logits(shape, seed=s, device=device) for s in (1, 2))
    ops = torch.ops.scan_fast
    torch.library.opcheck(ops.scan_loss_forward, (a, n, 2.0))
    total, _, _, mean_prob, row_stats = ops.scan_loss_forward(a, n, 2.0)
    torch.library.opcheck(ops.scan_loss_backward, (total, None, total, a, n, mean_prob, row_stats, 2.0))
    torch.library.opcheck(ops.scan_loss, (a.requires_grad_(), n.requires_grad_(), 2.0))


def test_float64_goes_through_the_reference() -> None:
    a, n = (logits((5, 4), torch.float64, seed=s).requires_grad_() for s in (1, 2))
    assert scan_loss(a, n)[0].dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x, y: scan_loss(x, y, 2.0), (a, n))
    with pytest.raises(ValueError, match="float64"):
        scan_loss(a, n, impl="native")


def test_wrong_input_raises() -> None:
    a = torch.zeros(4, 3)
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((torch.zeros(3), torch.zeros(3)), r"anchors must be logits.*\(3,\)"),
        ((torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 3)), "anchors must be logits"),
        ((torch.zeros(0, 3), torch.zeros(0, 3)), "anchors must not be empty"),
        ((torch.zeros(3, 0), torch.zeros(3, 0)), "anchors must not be empty"),
        ((a, torch.zeros(4, 2)), r"neighbors must have the shape of anchors, \(4, 3\), got \(4, 2\)"),
        ((a, a.half()), "neighbors must have the dtype of anchors"),
        ((a, a.to("meta")), "neighbors must be on the device of anchors"),
        ((a.long(), a.long()), "anchors must be floating-point"),
        ((a, a, math.nan), "entropy_weight must be a finite number, got nan"),
        ((a, a, math.inf), "entropy_weight"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            scan_loss(*arguments)
    with pytest.raises(ValueError, match="impl must be"):
        scan_loss(a, a, impl="fast")  # type: ignore[arg-type]


def test_module_is_the_function() -> None:
    a, n = logits((6, 4), seed=1), logits((6, 4), seed=2)
    for x, y in zip(SCANLoss(3.0)(a, n), scan_loss(a, n, 3.0), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
import torch
from scan_fast import _C, scan_loss, self_label_loss
worst = 0.0
for dtype, tolerance in ((torch.float32, 4e-6), (torch.bfloat16, 4e-3), (torch.float16, 6e-4)):
    for shape in ((5, 3), (40, 10), (9, 16), (21, 23), (37, 32), (17, 37), (3, 4100)):
        torch.manual_seed(0)
        a, n = ((torch.randn(shape) * 4).to(dtype).requires_grad_() for _ in range(2))
        a64, n64 = (x.detach().double().requires_grad_() for x in (a, n))
        for mine, exact in ((scan_loss(a, n, impl="native")[0], scan_loss(a64, n64)[0]),
                            (self_label_loss(a, n, 0.5, impl="native")[0], self_label_loss(a64, n64, 0.5)[0])):
            # 4e-6: float32 sums over 4100 classes in four lanes
            worst = max(worst, abs(mine.item() - exact.item()) / (1 + abs(exact.item())) / 4e-6)
            exact_gradient, = torch.autograd.grad(exact, n64)
            gradient, = torch.autograd.grad(mine, n)
            error = float((gradient - exact_gradient).abs().max() / exact_gradient.abs().max().clamp_min(1e-30))
            worst = max(worst, error / tolerance)
print(_C.build_info()["cpu_isa"], worst)
"""
    environment = {**os.environ, "SCAN_FAST_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    used, worst = result.stdout.split()
    names = ("baseline", "avx2", "avx512")
    assert used in names[: names.index(isa) + 1]
    assert float(worst) < 1
