"""NT-Xent against a float64 oracle that is written out pair by pair."""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import answers_by_rank

from scan_fast import NTXentLoss, nt_xent
from scan_fast.ops import native, reference, trust
from scan_fast.ops.dispatch import Impl
from scan_fast.ops.nt_xent import _check_ranks_agree, _DistributedNTXent, _local_choices

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
IMPLS: list[Impl] = ["reference", "native"] if native.is_available() else ["reference"]
needs_native = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")


def views(
    n: int, d: int, *, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu", close: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two correlated views, so that positives differ from negatives."""
    generator = torch.Generator().manual_seed(seed)
    z0 = torch.randn(n, d, generator=generator)
    z1 = close * z0 + (1 - close) * torch.randn(n, d, generator=generator)
    z0, z1 = (z.to(device=device, dtype=dtype).requires_grad_() for z in (z0, z1))
    return z0, z1


def oracle(
    z0: torch.Tensor, z1: torch.Tensor, temperature: float, anchors: str
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Compute the definition in float64: one cross-entropy per anchor over all rows except the anchor."""
    z0, z1 = (z.detach().double().cpu().requires_grad_() for z in (z0, z1))
    unit = F.normalize(torch.cat([z0, z1]), dim=1)
    n = z0.shape[0]
    anchors_index = torch.arange(2 * n if anchors == "both" else n)
    others = torch.arange(2 * n) != anchors_index[:, None]
    logits = (unit[anchors_index] @ unit.T / temperature)[others].view(len(anchors_index), 2 * n - 1)
    positive = (anchors_index + n) % (2 * n)
    target = positive - (positive > anchors_index).long()  # its index without the anchor
    return F.cross_entropy(logits, target, reduction="none"), (z0, z1)


def gradients(losses: torch.Tensor, inputs: Sequence[torch.Tensor], upstream: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(losses, inputs, upstream.to(losses), retain_graph=True)


def assert_matches(z0: torch.Tensor, z1: torch.Tensor, temperature: float, anchors: str, impl: Impl) -> None:
    """Check losses and gradients for a random upstream gradient; the tolerance grows with rounding of the logits."""
    expected, inputs = oracle(z0, z1, temperature, anchors)
    losses = nt_xent(z0, z1, temperature, anchors=anchors, reduction="none", impl=impl)
    assert losses.dtype == torch.float32
    resolution = max(1.0, 0.1 / temperature)
    torch.testing.assert_close(losses.double().cpu(), expected, rtol=2e-6, atol=3e-6 * resolution)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7)).double()
    for ours, exact in zip(gradients(losses, (z0, z1), upstream), gradients(expected, inputs, upstream), strict=True):
        # du / tau / |x| with du exact to float32: the gradient of a short row is large or, at D = 1, cancels to zero.
        longest = max(
            float(exact.abs().max()), *(float((1 / z.detach().norm(dim=1)).nan_to_num(posinf=0).max()) for z in inputs)
        )
        torch.testing.assert_close(ours.double().cpu(), exact, rtol=0, atol=2e-5 * resolution * longest)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("anchors", ["both", "first"])
@pytest.mark.parametrize(
    ("n", "d", "temperature"),
    [(1, 3, 0.5), (2, 1, 0.5), (3, 7, 0.1), (65, 33, 0.07), (130, 128, 0.5), (40, 300, 0.1), (9, 2051, 0.2)],
)
def test_matches_the_definition(device: str, impl: Impl, anchors: str, n: int, d: int, temperature: float) -> None:
    assert_matches(*views(n, d, device=device), temperature, anchors, impl)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 70),
    d=st.integers(1, 70),
    temperature=st.floats(0.05, 5.0),
    anchors=st.sampled_from(["both", "first"]),
    impl=st.sampled_from(IMPLS),
    seed=st.integers(0, 1000),
)
def test_matches_the_definition_for_any_shape(
    n: int, d: int, temperature: float, anchors: str, impl: Impl, seed: int
) -> None:
    assert_matches(*views(n, d, seed=seed), temperature, anchors, impl)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("anchors", ["both", "first"])
@pytest.mark.parametrize("temperature", [0.5, 0.0301, 0.02, 0.003])
def test_several_blocks_against_the_reference(device: str, anchors: str, temperature: float) -> None:
    """More rows than one tile holds, at temperatures with one shift for all rows and with one per row."""
    z0, z1 = views(701, 72, device=device, seed=3)
    exact0, exact1 = (z.detach().double().requires_grad_() for z in (z0, z1))
    upstream = torch.linspace(-1, 2, 1402 if anchors == "both" else 701, device=device)
    results = []
    inputs: tuple[torch.Tensor, torch.Tensor]
    impl: Impl
    for inputs, impl in (((z0, z1), "native"), ((z0, z1), "reference"), ((exact0, exact1), "reference")):
        losses = nt_xent(*inputs, temperature, anchors=anchors, reduction="none", impl=impl)
        results.append([losses, *gradients(losses, inputs, upstream)])
    for ours, plain, exact in zip(*results, strict=True):
        error, plain_error = ((x.double() - exact).abs().max() for x in (ours, plain))
        assert error <= 2 * plain_error + 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_golden_value(impl: Impl) -> None:
    """The result equals that of the original implementation."""

    def grid(k: float) -> torch.Tensor:
        return torch.tensor([[math.sin((i * 6 + j) * k) for j in range(6)] for i in range(8)])

    loss = nt_xent(grid(0.9), grid(1.1), 0.1, anchors="first", impl=impl)
    assert float(loss) == pytest.approx(9.2080641, rel=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs(device: str, impl: Impl, dtype: torch.dtype) -> None:
    z0, z1 = views(50, 24, dtype=dtype, device=device)
    expected, inputs = oracle(z0, z1, 0.2, "both")
    loss = nt_xent(z0, z1, 0.2, impl=impl)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-3 if device == "cuda" else 1e-6)
    loss.backward()
    for z, exact in zip((z0, z1), torch.autograd.grad(expected.mean(), inputs), strict=True):
        assert z.grad is not None
        assert z.grad.dtype == dtype
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(z.grad.double().cpu(), exact, rtol=2 * unit, atol=unit * float(exact.abs().max()))


def test_float64_goes_through_the_reference() -> None:
    z0, z1 = views(5, 4, dtype=torch.float64)
    assert nt_xent(z0, z1).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda a, b: nt_xent(a, b, 0.3, reduction="none"), (z0, z1))
    if native.is_available():
        with pytest.raises(ValueError, match="float64"):
            nt_xent(z0, z1, impl="native")


@pytest.mark.parametrize("impl", IMPLS)
def test_reductions(impl: Impl) -> None:
    z0, z1 = views(6, 5)
    losses = nt_xent(z0, z1, reduction="none", impl=impl)
    assert losses.shape == (12,)
    torch.testing.assert_close(nt_xent(z0, z1, reduction="sum", impl=impl), losses.sum())
    torch.testing.assert_close(nt_xent(z0, z1, impl=impl), losses.mean())
    assert nt_xent(z0, z1, anchors="first", reduction="none", impl=impl).shape == (6,)
    torch.testing.assert_close(nt_xent(z0, z1, anchors="first", reduction="none", impl=impl), losses[:6])
    torch.testing.assert_close(NTXentLoss(0.5, impl=impl)(z0, z1), losses.mean())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_one_pair_has_no_negatives(device: str, impl: Impl) -> None:
    z0, z1 = views(1, 4, device=device)
    loss = nt_xent(z0, z1, 0.1, impl=impl)
    loss.backward()
    assert float(loss.detach()) == 0
    assert z0.grad is not None and z1.grad is not None
    assert not z0.grad.any() and not z1.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_non_contiguous_inputs(device: str, impl: Impl) -> None:
    z0, z1 = views(20, 16, device=device)
    wide = torch.stack([z0.detach(), z1.detach()], dim=2).requires_grad_()  # stride 2 along D
    transposed = z1.detach().T.contiguous().T.requires_grad_()
    expected = nt_xent(z0, z1, impl=impl)
    expected.backward()
    torch.testing.assert_close(nt_xent(wide[..., 0], transposed, impl=impl), expected)
    nt_xent(wide[..., 0], transposed, impl=impl).backward()
    assert wide.grad is not None
    torch.testing.assert_close(wide.grad[..., 0], z0.grad)
    torch.testing.assert_close(transposed.grad, z1.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_upstream_gradient_and_repeated_backward(device: str, impl: Impl) -> None:
    z0, z1 = views(9, 6, device=device)
    losses = nt_xent(z0, z1, reduction="none", impl=impl)
    ones = torch.ones((), device=device).expand(18)  # stride 0
    first = torch.autograd.grad(losses, (z0, z1), ones, retain_graph=True)
    again = torch.autograd.grad(losses, (z0, z1), ones, retain_graph=True)
    tripled = torch.autograd.grad(losses, (z0, z1), 3 * ones)
    expected, inputs = oracle(z0, z1, 0.5, "both")
    for one, two, three, exact in zip(first, again, tripled, torch.autograd.grad(expected.sum(), inputs), strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(three, 3 * one)
        torch.testing.assert_close(one.double().cpu(), exact, rtol=1e-4, atol=1e-5)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_only_one_input_needs_a_gradient(device: str) -> None:
    z0, z1 = views(8, 6, device=device)
    nt_xent(z0, z1.detach(), impl="native").backward()
    assert z0.grad is not None
    expected, inputs = oracle(z0, z1, 0.5, "both")
    torch.testing.assert_close(
        z0.grad.double().cpu(), torch.autograd.grad(expected.mean(), inputs)[0], rtol=1e-4, atol=1e-6
    )
    assert z1.grad is None


@needs_native
def test_double_backward_raises() -> None:
    z0, z1 = views(4, 3)
    (grad,) = torch.autograd.grad(nt_xent(z0, z1, impl="native"), z0, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        grad.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [1e-6, 1e8])
def test_scale_does_not_matter(device: str, impl: Impl, factor: float) -> None:
    z0, z1 = views(30, 12, device=device)
    plain = nt_xent(z0, z1, 0.2, impl=impl)
    plain.backward()
    s0, s1 = ((z.detach() * factor).requires_grad_() for z in (z0, z1))
    scaled = nt_xent(s0, s1, 0.2, impl=impl)
    scaled.backward()
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-5)
    assert s0.grad is not None
    torch.testing.assert_close(s0.grad * factor, z0.grad, rtol=1e-4, atol=1e-6)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("factor", [1e30, 1e-11])
def test_lengths_whose_squares_leave_float32(device: str, factor: float) -> None:
    z0, z1 = views(30, 12, device=device)
    s0, s1 = ((z.detach() * factor).requires_grad_() for z in (z0, z1))
    torch.testing.assert_close(nt_xent(s0, s1, 0.2, impl="native"), nt_xent(z0, z1, 0.2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_zero_rows(device: str, impl: Impl) -> None:
    z0, z1 = (z.detach() for z in views(5, 4, device=device))
    z0[2] = 0
    z1[2:4] = 0
    assert_matches(z0.requires_grad_(), z1.requires_grad_(), 0.3, "both", impl)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_identical_and_opposite_rows(device: str, impl: Impl) -> None:
    """All similarities are at their bounds, the worst case for one shift for all rows."""
    base = torch.tensor([[1.0, 2.0, -1.0]], device=device)
    same = base.expand(6, 3).clone().requires_grad_()
    assert_matches(same, same.detach().clone().requires_grad_(), 0.05, "both", impl)
    signs = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], device=device)
    assert_matches((base * signs).requires_grad_(), (-base * signs).requires_grad_(), 0.05, "both", impl)


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0.5, 0.01])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_rows_are_not_hidden(device: str, temperature: float, bad: float) -> None:
    z0, z1 = (z.detach() for z in views(40, 20, device=device))
    z0[3, 5] = bad
    z0.requires_grad_()
    losses = nt_xent(z0, z1, temperature, reduction="none", impl="native")
    assert losses.isnan().all()  # the row is a negative or the anchor of every loss
    losses.sum().backward()
    assert z0.grad is not None
    assert z0.grad.isnan().all()


@needs_native
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_no_nan_is_hidden_from_other_anchors(isa: str) -> None:
    """Whatever the bits of the NaN: an exponential that adds to the exponent's bits turns some into numbers."""
    code = """
import itertools, numpy, torch
from scan_fast import nt_xent
for bits, sizes, temperature, anchors, precision in itertools.product(
    (0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800001, 0xFFC000FF, 0xFFFFFFFF),
    ((4, 5), (40, 20), (150, 33)), (0.5, 0.01), ("both", "first"), ("highest", "medium"),
):
    torch.set_float32_matmul_precision(precision)
    z0, z1 = torch.randn(2, *sizes, generator=torch.Generator().manual_seed(0))
    z0.numpy().view(numpy.uint32)[2, 3] = bits
    z0.requires_grad_()
    losses = nt_xent(z0, z1, temperature, anchors=anchors, reduction="none", impl="native")
    assert losses.isnan().all(), (hex(bits), sizes, temperature, anchors, precision)
    losses.sum().backward()
    assert z0.grad.isnan().all(), (hex(bits), sizes, temperature, anchors, precision)
"""
    environment = {**os.environ, "SCAN_FAST_CPU_ISA": isa}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@needs_native
@pytest.mark.parametrize("temperature", [1e-8, 1e-4, 1e4])
def test_extreme_temperatures_stay_finite(temperature: float) -> None:
    z0, z1 = views(33, 8)
    loss = nt_xent(z0, z1, temperature, impl="native")
    loss.backward()
    expected = nt_xent(z0.double(), z1.double(), temperature)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=1e-5)
    assert z0.grad is not None and z1.grad is not None
    assert z0.grad.isfinite().all() and z1.grad.isfinite().all()


@needs_native
@pytest.mark.parametrize("anchors", ["both", "first"])
def test_same_bits_for_any_number_of_threads(anchors: str) -> None:
    z0, z1 = views(700, 40)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            losses = nt_xent(z0, z1, 0.1, anchors=anchors, reduction="none", impl="native")
            results.append([losses, *torch.autograd.grad(losses.sum(), (z0, z1))])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@needs_native
@pytest.mark.parametrize("products", ["tiles", "mkl"])
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str, products: str, tmp_path: Path) -> None:
    """One process per instruction set and kind of product gives what the definition gives in float64.

    The sizes have several blocks of register tiles, whole ones and not, for rows, columns and dimensions.
    """
    cases = {}
    for samples, dim in ((150, 37), (413, 16), (500, 70)):
        z0, z1 = views(samples, dim)
        for temperature in (0.2, 0.01):
            for anchors in ("both", "first"):
                losses, exact = oracle(z0, z1, temperature, anchors)
                upstream = torch.linspace(-1, 1, len(losses))
                grads = gradients(losses, exact, upstream)
                case = [z0.detach(), z1.detach(), upstream, losses.detach(), *grads]
                cases[samples, temperature, anchors] = case
    torch.save(cases, tmp_path / "case.pt")
    code = """
import sys, torch
from scan_fast import _C, nt_xent
print(_C.build_info()["cpu_gemm"])
for (_, temperature, anchors), (z0, z1, upstream, *expected) in torch.load(sys.argv[1]).items():
    z = [x.requires_grad_() for x in (z0, z1)]
    losses = nt_xent(*z, temperature, anchors=anchors, reduction="none", impl="native")
    for ours, exact in zip([losses.detach(), *torch.autograd.grad(losses, z, upstream)], expected, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=2e-6 / temperature)
"""
    environment = {**os.environ, "SCAN_FAST_CPU_ISA": isa, "SCAN_FAST_CPU_GEMM": products}
    command = [sys.executable, "-c", code, str(tmp_path / "case.pt")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == products or not torch.backends.mkl.is_available()


@needs_native
def test_medium_matmul_precision_allows_sixteen_bit_products() -> None:
    z0, z1 = views(600, 128)
    exact = nt_xent(z0, z1, 0.1, impl="native")
    exact_grad = torch.autograd.grad(exact, z0)[0]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        rounded = nt_xent(z0, z1, 0.1, impl="native")
        rounded_grad = torch.autograd.grad(rounded, z0)[0]
    finally:
        torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)
    assert (rounded_grad - exact_grad).norm() <= 1e-2 * exact_grad.norm()
    if native.build_info()["cpu_gemm_bf16"] or native.build_info()["cpu_bf16_vectors"]:
        assert not torch.equal(rounded_grad, exact_grad)


@needs_native
def test_no_matrix_of_all_pairs_is_stored() -> None:
    """The peak of the process grows by far less than one M x M matrix (268 MB here)."""
    code = """
import resource, torch
from scan_fast import nt_xent
z = [torch.randn(4096, 128, requires_grad=True) for _ in range(2)]
small = [x[:64].detach().requires_grad_() for x in z]
nt_xent(*small, 0.1, impl="native").backward()
for x in z:
    x.grad = torch.zeros_like(x)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
nt_xent(*z, 0.1, impl="native").backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 32 * 1024


@needs_native
@pytest.mark.parametrize("device", DEVICES)
def test_operators_pass_opcheck(device: str) -> None:
    z0, z1 = views(9, 6, device=device)
    ops = torch.ops.scan_fast
    for both, begin, count in ((True, 0, 9), (False, 2, 4)):
        arguments = (z0.detach(), z1.detach(), 0.2, both, begin, count)
        torch.library.opcheck(ops.nt_xent_forward.default, arguments)
        losses, lse, unit, inv_norm = ops.nt_xent_forward(z0.detach(), z1.detach(), 0.2, both, 0, 9)
        saved = (torch.randn_like(losses), losses, lse, unit, inv_norm)
        torch.library.opcheck(ops.nt_xent_backward.default, (*saved, 0.2, both, begin, count, torch.float16))


@needs_native
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("anchors", ["both", "first"])
def test_compiles_without_graph_breaks(device: str, anchors: str) -> None:
    z0, z1 = views(12, 8, device=device)

    def step(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return nt_xent(2 * a, b, 0.2, anchors=anchors, impl="native") * 3

    expected = step(z0, z1)
    expected.backward()
    c0, c1 = (z.detach().clone().requires_grad_() for z in (z0, z1))
    torch._dynamo.reset()
    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(c0, c1)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(c0.grad, z0.grad)
    torch.testing.assert_close(c1.grad, z1.grad)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast(device: str, impl: Impl) -> None:
    z0, z1 = views(30, 16, device=device)
    expected = nt_xent(z0, z1, 0.1, impl=impl)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = nt_xent(z0, z1, 0.1, impl=impl)
        mixed = nt_xent(z0 @ torch.eye(16, device=device), z1 @ torch.eye(16, device=device), 0.1, impl=impl)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-6)
    assert mixed.dtype == torch.float32
    mixed.backward()
    assert z0.grad is not None
    assert z0.grad.dtype == torch.float32 and z0.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z0": torch.zeros(3)}, r"z0 must have 2 dimensions .* got shape \(3,\)"),
        ({"z1": torch.zeros(4, 5)}, r"same shape, got \(3, 5\) and \(4, 5\)"),
        ({"z0": torch.zeros(0, 5), "z1": torch.zeros(0, 5)}, "at least one row"),
        ({"z0": torch.zeros(3, 0), "z1": torch.zeros(3, 0)}, "one column"),
        ({"z0": torch.zeros(3, 5, dtype=torch.int64)}, "z0 must be float32"),
        ({"z1": torch.zeros(3, 5, dtype=torch.bfloat16)}, "same dtype"),
        ({"z1": torch.zeros(3, 5, device="meta")}, "same device, got cpu and meta"),
        ({"z0": None}, "z0 must be a tensor, got NoneType"),
        ({"temperature": 0.0}, "temperature must be finite and at least 1e-8, got 0.0"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": "0.1"}, "temperature must be a number"),
        ({"anchors": "second"}, 'anchors must be "both" or "first", got \'second\''),
        ({"reduction": "max"}, 'reduction must be "mean", "sum" or "none", got \'max\''),
    ],
)
def test_wrong_arguments_raise(impl: Impl, change: dict[str, Any], message: str) -> None:
    arguments = {"z0": torch.zeros(3, 5), "z1": torch.zeros(3, 5), "temperature": 0.5, "impl": impl, **change}
    with pytest.raises(ValueError, match=message):
        nt_xent(**arguments)


def test_unknown_impl_raises() -> None:
    with pytest.raises(ValueError, match="impl must be"):
        nt_xent(torch.zeros(2, 2), torch.zeros(2, 2), impl="fast")  # type: ignore[arg-type]


@needs_native
def test_local_ranges_make_up_the_whole() -> None:
    """Any split of the samples gives the rows of the full result, as in a distributed run."""
    z0, z1 = (z.detach() for z in views(300, 24))
    ops = torch.ops.scan_fast
    for both in (True, False):
        losses, lse, unit, inv_norm = ops.nt_xent_forward(z0, z1, 0.1, both, 0, 300)
        upstream = torch.linspace(-1, 1, losses.numel())
        whole = ops.nt_xent_backward(upstream, losses, lse, unit, inv_norm, 0.1, both, 0, 300, torch.float32)
        for begin, end in ((0, 1), (1, 170), (170, 300)):
            part = ops.nt_xent_forward(z0, z1, 0.1, both, begin, end - begin)[0]
            expected = losses.view(-1, 300)[:, begin:end].flatten()
            torch.testing.assert_close(part, expected, rtol=1e-6, atol=1e-6)
            grads = ops.nt_xent_backward(
                upstream, losses, lse, unit, inv_norm, 0.1, both, begin, end - begin, torch.float32
            )
            for grad, full in zip(grads, whole, strict=True):
                torch.testing.assert_close(grad, full[begin:end], rtol=1e-4, atol=1e-5)


def test_without_a_process_group_gathering_changes_nothing() -> None:
    z0, z1 = views(6, 5)
    torch.testing.assert_close(NTXentLoss(0.2, gather_distributed=True)(z0, z1), NTXentLoss(0.2)(z0, z1))


def _rank(rank: int, store_path: str, world: int, n: int, results: Any) -> None:
    """Run one rank in its own process: put (rank, losses and gradients per case, error text) into the queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store_path}", rank=rank, world_size=world)
    answers: dict[Any, Any] = {}
    full = [z.detach() for z in views(world * n, 19, seed=5)]
    for impl in IMPLS:
        for anchors in ("both", "first"):
            z0, z1 = (z[rank * n : (rank + 1) * n].clone().requires_grad_() for z in full)
            loss = NTXentLoss(0.1, anchors=anchors, gather_distributed=True, impl=impl)(z0, z1)
            loss.backward()
            assert z0.grad is not None and z1.grad is not None
            answers[impl, anchors] = (loss.item(), z0.grad.tolist(), z1.grad.tolist())
    try:
        NTXentLoss(0.1, gather_distributed=True)(*(z[: 8 - 3 * rank] for z in full))
        refusal = "nothing was raised"
    except ValueError as error:
        refusal = str(error)
    # As on a GPU: a shape that all ranks know is not read again, and only a rank with a new shape raises.
    once = []
    for rows in (n, n if rank == 0 else n - 1):
        try:
            assert _check_ranks_agree(full[0][:rows], None, True, every_time=False)
            once.append("agreed")
        except ValueError as error:
            once.append(str(error))
    # As on two GPUs of which one is not trusted: all ranks use the reference.
    trust.DEVICE_TYPES = frozenset({"cpu"})
    trust._decided["nt_xent", "cpu", 0] = rank == 0
    _local_choices.clear()
    taken = []
    forward = _DistributedNTXent.apply

    def counted(*arguments: Any) -> Any:
        taken.append("kernel")
        return forward(*arguments)

    _DistributedNTXent.apply = counted
    for impl, trusted_by_all in (("auto", False), ("auto", True), ("native", True)):
        # A later decision, as after a CUDA graph, changes nothing: the other ranks would not know it in time.
        trust._decided["nt_xent", "cpu", 0] = trusted_by_all or rank == 0
        z0, z1 = (z[rank * n : (rank + 1) * n].clone().requires_grad_() for z in full)
        loss = NTXentLoss(0.1, gather_distributed=True, impl=impl if native.is_available() else "auto")(z0, z1)
        loss.backward()
        before = answers["reference", "both"]
        off = max(
            (now - torch.tensor(then)).abs().max().item()
            for now, then in zip((loss.detach(), z0.grad, z1.grad), before, strict=True)
        )
        answers.setdefault("mixed", []).append((len(taken), off))
    results.put((rank, answers, refusal, once))
    dist.destroy_process_group()


@pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="no gloo")
def test_two_processes(tmp_path: Path) -> None:
    """Two ranks give the loss and the gradient of the full batch, and raise for batches of different sizes."""
    world, n = 2, 21
    by_rank = answers_by_rank(_rank, tmp_path, world, n, seconds=120)
    for impl in IMPLS:
        for anchors in ("both", "first"):
            expected, inputs = oracle(*views(world * n, 19, seed=5), 0.1, anchors)
            cases = [answers[impl, anchors] for _, answers, _, _ in by_rank]
            assert sum(case[0] for case in cases) / world == pytest.approx(expected.mean().item(), rel=1e-5)
            # The mean over ranks, as in DistributedDataParallel, is the gradient of the mean over all anchors.
            for view, exact in enumerate(torch.autograd.grad(expected.mean(), inputs)):
                ours = torch.cat([torch.tensor(case[1 + view]) for case in cases]) / world
                torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-6)
    for _, answers, _, _ in by_rank:
        assert [kernels for kernels, _ in answers["mixed"]] == [0, 0, 1 if native.is_available() else 0]
        assert [off for _, off in answers["mixed"][:2]] == [0, 0]
        assert answers["mixed"][2][1] < 1e-5
    for _, _, refusal, _ in by_rank:
        assert "every rank must pass" in refusal and "(8, 19)" in refusal and "(5, 19)" in refusal
    assert by_rank[0][3] == ["agreed", "agreed"]
    assert by_rank[1][3][0] == "agreed" and "(21, 19)" in by_rank[1][3][1] and "(20, 19)" in by_rank[1][3][1]


def test_reference_is_the_definition_of_the_gradient() -> None:
    """The gradient of the reference equals finite differences."""
    z0, z1 = views(3, 4, dtype=torch.float64)
    for both in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, both=both: reference.nt_xent(a, b, 0.4, both), (z0, z1))
