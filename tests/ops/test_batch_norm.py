"""Batch normalisation with residual and ReLU: compiled kernel and reference against float64, on every device."""

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast.ops import dispatch, native, reference
from scan_fast.ops.batch_norm import batch_norm
from scan_fast.ops.dispatch import Impl

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built")
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
SHAPES = [(4, 16, 8, 8), (2, 1, 1, 1), (3, 3, 5, 7), (130, 20, 1, 1), (2, 130, 9, 9), (1, 64, 33, 1), (9, 17, 40, 50)]
NAMES = ("y", "running_mean", "running_var", "grad_x", "grad_weight", "grad_bias", "grad_residual")
Inputs = tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Any, torch.Tensor
]  # x, weight, bias, running_mean, running_var, residual or None, upstream gradient


def problem(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    residual: bool = False,
    seed: int = 0,
    device: str = "cpu",
    mean: float = 0.4,
    spread: float = 1.7,
) -> Inputs:
    """Return x, weight, bias, running_mean, running_var, residual and upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    def images(values: torch.Tensor) -> torch.Tensor:
        return values.to(dtype).to(device, memory_format=torch.channels_last)

    channels = shape[1]
    x, other, upstream = mean + spread * normal(*shape), normal(*shape), normal(*shape)
    statistics = mean + 0.1 * normal(channels), spread**2 * (0.5 + torch.rand(channels, generator=generator))
    weight, bias, running_mean, running_var = (t.to(device) for t in (normal(channels), normal(channels), *statistics))
    return (images(x), weight, bias, running_mean, running_var, images(other) if residual else None, images(upstream))


def run(
    inputs: Sequence[Any],
    impl: Impl,
    *,
    training: bool = True,
    relu: bool = True,
    running: bool = True,
    gate: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Return all results of a call, by name. A gate, if given, replaces the ReLU's mask in the backward pass."""
    copies: list[Any] = [t if t is None else t.detach().clone() for t in inputs]
    x, weight, bias, mean, var, residual, upstream = copies
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual) if t is not None]
    mean, var = (mean, var) if running else (None, None)
    options: dict[str, Any] = {"residual": residual, "training": training, "momentum": 0.2, "impl": impl}
    y = batch_norm(x, weight, bias, mean, var, relu=relu and gate is None, **options)
    gradients = torch.autograd.grad(y, leaves, upstream if gate is None else upstream * gate)
    y = y.detach().relu() if relu else y.detach()
    return dict(zip(NAMES, (y, mean, var, *gradients), strict=False))


def errors(found: dict[str, Any], inputs: Sequence[Any], **options: bool) -> dict[str, tuple[float, float]]:
    """Return per result its error against float64 and its Euclidean norm.

    Rounding may move a value across zero, where both gradients of the ReLU are right. The sign is taken from `found`.
    """
    gate = (found["y"] > 0).double() if options["relu"] else torch.ones_like(found["y"], dtype=torch.float64)
    exact = run([t if t is None else t.double() for t in inputs], "reference", gate=gate, **options)
    assert found.keys() == exact.keys()
    return {
        name: (float((found[name].double() - want).norm()), float(want.norm()))
        for name, want in exact.items()
        if want is not None
    }


def check(inputs: Sequence[Any], *, training: bool = True, relu: bool = True, running: bool = True) -> None:
    """Check that errors are at most twice those of PyTorch in the same dtype, plus a few units in the last place."""
    options: dict[str, Any] = {"training": training, "relu": relu, "running": running}
    ours, plain = run(inputs, "native", **options), run(inputs, "reference", **options)
    allowed = errors(plain, inputs, **options)
    for name, (error, size) in errors(ours, inputs, **options).items():
        assert ours[name].dtype == plain[name].dtype and ours[name].shape == plain[name].shape, name
        assert ours[name].ndim == 1 or ours[name].is_contiguous(memory_format=torch.channels_last), name
        units = 4 * ROUNDING[ours[name].dtype] * size + 1e-6 * ours[name].numel() ** 0.5
        assert error <= 2 * allowed[name][0] + units, (
            f"{name}: {error:.1e}, PyTorch {allowed[name][0]:.1e} of {size:.1e}"
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool, relu: bool, training: bool, device: str
) -> None:
    check(problem(shape, dtype, residual=residual, device=device), training=training, relu=relu)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from(DTYPES),
    residual=st.booleans(),
    relu=st.booleans(),
    training=st.booleans(),
)
def test_matches_float64_at_any_shape(
    shape: tuple[int, ...], dtype: torch.dtype, residual: bool, relu: bool, training: bool
) -> None:
    training = training and shape[0] * shape[2] * shape[3] > 1
    check(problem(shape, dtype, residual=residual, seed=sum(shape)), training=training, relu=relu)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_leaves_the_variance_its_digits(mean: float, device: str) -> None:
    inputs = problem((16, 24, 12, 12), device=device, mean=mean, spread=1.0)
    check(inputs)
    y = run(inputs, "native", relu=False)["y"].transpose(0, 1).flatten(1).double()
    assert torch.allclose(y.std(1, unbiased=False), inputs[1].double().abs(), rtol=2e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_constant_channel_becomes_its_bias(device: str) -> None:
    inputs = list(problem((4, 24, 6, 6), device=device))
    inputs[0] = torch.full_like(inputs[0], 3.7)
    found = run(inputs, "native", relu=False)
    assert torch.equal(found["y"], inputs[2][:, None, None].expand_as(found["y"]))
    assert not found["grad_weight"].any() and found["grad_x"].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_non_finite_values_propagate_as_in_pytorch(residual: bool, training: bool, device: str) -> None:
    inputs = problem((4, 20, 6, 6), residual=residual, device=device)
    inputs[1].abs_()
    inputs[0][1, 0, 2, 3], inputs[0][1, 5, 2, 3], inputs[0][2, 19, 0, 0] = torch.nan, torch.inf, -torch.inf
    ours, plain = run(inputs, "native", training=training), run(inputs, "reference", training=training)
    for name in ("y", "grad_x"):
        assert torch.equal(ours[name].isnan(), plain[name].isnan()), name
        assert torch.equal(ours[name].isinf(), plain[name].isinf()), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [True, False])
def test_without_running_statistics(residual: bool, device: str) -> None:
    inputs = problem((5, 18, 4, 4), residual=residual, device=device)
    check(inputs, running=False)
    for missing in (2, 3):
        arguments: list[Any] = [t.clone() for t in inputs[1:5]]
        arguments[missing] = None
        with pytest.raises(ValueError, match="running_mean and running_var must both be given"):
            batch_norm(inputs[0], *arguments, training=True, impl="native")
    with pytest.raises(ValueError, match="running_mean and running_var must both be given"):
        batch_norm(*inputs[:3], None, None, training=False, impl="native")


def test_auto_uses_the_kernel_if_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def plain(*arguments: Any, **options: Any) -> torch.Tensor:
        taken.append("reference")
        return right(*arguments, **options)

    right = reference.batch_norm
    monkeypatch.setattr(reference, "batch_norm", plain)
    inputs = problem((4, 16, 5, 5), residual=True)
    x, residual = inputs[0], inputs[5]

    def auto(x: torch.Tensor, residual: torch.Tensor | None = None) -> bool:
        taken.clear()
        arguments = [t.to(torch.float64 if x.dtype == torch.float64 else torch.float32) for t in inputs[1:5]]
        y = batch_norm(x, *arguments, residual=residual, training=True)
        assert y.shape == x.shape
        return taken == []

    assert auto(x) and auto(x, residual) and auto(x.half(), residual.half())
    assert not auto(x.contiguous())
    assert not auto(x, residual.contiguous())
    assert not auto(x[:, :, ::2])
    assert not auto(x.double())
    assert not auto(x.half(), residual)  # PyTorch adds them in float32, and so does the fallback
    monkeypatch.setattr(dispatch, "use_native", lambda *_, **__: False)
    assert not auto(x)


def test_native_requires_channels_last() -> None:
    inputs = problem((4, 16, 5, 5))
    for x in (inputs[0].contiguous(), inputs[0][:, :, ::2], inputs[0][:, ::2]):
        channels = x.shape[1]
        with pytest.raises(ValueError, match=r"x must be \(N, C, H, W\) in channels-last layout"):
            batch_norm(x, *(t[:channels] for t in inputs[1:5]), training=True, impl="native")
    with pytest.raises(ValueError, match="float64"):
        batch_norm(inputs[0].double(), *(t.double() for t in inputs[1:5]), training=True, impl="native")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_the_upstream_gradient_may_have_any_layout_and_dtype(layout: torch.memory_format) -> None:
    inputs = problem((4, 16, 5, 5), residual=True)
    expected = run(inputs, "native")
    found = run((*inputs[:6], inputs[6].contiguous(memory_format=layout)), "native")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    x = inputs[0].clone().requires_grad_()
    batch_norm(x, *inputs[1:5], training=False, impl="native").sum().backward()  # an expanded scalar
    y = batch_norm(x, *inputs[1:5], training=False, impl="native")
    torch.testing.assert_close(x.grad, torch.autograd.grad(y, x, torch.ones_like(y))[0])


def test_gradients_of_some_inputs() -> None:
    inputs = problem((4, 16, 5, 5), residual=True)
    expected = run(inputs, "native")
    leaves = [t.clone() for t in (*inputs[:3], inputs[5])]
    for leaf, name in zip(leaves, ("grad_x", "grad_weight", "grad_bias", "grad_residual"), strict=True):
        leaf.requires_grad_()
        x, weight, bias, residual = leaves
        y = batch_norm(x, weight, bias, None, None, residual=residual, training=True, impl="native")
        (found,) = torch.autograd.grad(y, leaf, inputs[6])
        assert torch.equal(found, expected[name])
        leaf.requires_grad_(False)
    with torch.no_grad():
        assert not batch_norm(leaves[0].requires_grad_(), *inputs[1:5], training=True, impl="native").requires_grad


@pytest.mark.parametrize("device", DEVICES)
def test_graph_can_be_used_again(device: str) -> None:
    inputs = problem((4, 16, 5, 5), residual=True, device=device)
    x, residual = (t.clone().requires_grad_() for t in (inputs[0], inputs[5]))
    y = batch_norm(x, *inputs[1:5], residual=residual, training=True, impl="native")
    first = torch.autograd.grad(y, (x, residual), inputs[6], retain_graph=True)
    again = torch.autograd.grad(2 * y, (x, residual), inputs[6])
    torch.testing.assert_close([2 * g for g in first], list(again))
    for _ in range(2):
        batch_norm(x, *inputs[1:5], residual=residual, training=True, impl="native").backward(inputs[6])
    torch.testing.assert_close(x.grad, 2 * first[0])


def test_double_backward_raises() -> None:
    inputs = problem((4, 16, 5, 5))
    x = inputs[0].clone().requires_grad_()
    y = batch_norm(x, *inputs[1:5], training=True, impl="native")
    (gradient,) = torch.autograd.grad(y, x, inputs[6], create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm cannot be differentiated twice"):
        gradient.sum().backward()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_input_same_bits(dtype: torch.dtype, device: str) -> None:
    inputs = problem((16, 48, 20, 20), dtype, residual=True, device=device)
    expected = run(inputs, "native")
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found = run(inputs, "native")
            assert all(torch.equal(found[name], expected[name]) for name in expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    code = """
import test_batch_norm as cases
from scan_fast import _C
for shape in ((3, 40, 5, 5), (2, 7, 6, 6)):
    for dtype in cases.DTYPES:
        for residual in (False, True):
            cases.check(cases.problem(shape, dtype, residual=residual))
print(_C.build_info()["cpu_isa"])
"""
    folders = [os.path.dirname(__file__), *sys.path]
    environment = {**os.environ, "SCAN_FAST_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(folders)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    names = ("baseline", "avx2", "avx512")
    assert result.stdout.strip() in names[: names.index(isa) + 1]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_opcheck(training: bool, residual: bool, device: str) -> None:
    x, weight, bias, mean, var, other, upstream = problem((3, 20, 4, 4), residual=residual, device=device)
    ops = torch.ops.scan_fast
    arguments = (x, other, weight, bias, mean, var, training, 0.1, 1e-5, True)
    torch.library.opcheck(ops.batch_norm_forward, (*arguments, residual))
    _, batch_mean, inv_std, mask = ops.batch_norm_forward(*arguments, residual)
    backward = (upstream, x, weight, bias, batch_mean, inv_std, mask, training, True, residual)
    torch.library.opcheck(ops.batch_norm_backward, backward)
    x.requires_grad_()
    torch.library.opcheck(ops.batch_norm, arguments)


def test_compiles_without_graph_breaks() -> None:
    inputs = problem((3, 20, 4, 4), residual=True)

    def step(x: torch.Tensor, residual: torch.Tensor, mean: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
        return batch_norm(x + 0, *inputs[1:3], mean, var, residual=2 * residual, training=True, impl="native") * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, step):
        x, residual = (t.clone().requires_grad_() for t in (inputs[0], inputs[5]))
        mean, var = inputs[3].clone(), inputs[4].clone()
        y = call(x, residual, mean, var)
        results.append([y.detach(), mean, var, *torch.autograd.grad(y, (x, residual), inputs[6])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_wrong_input_raises() -> None:
    x, weight, bias, mean, var, residual, _ = problem((4, 16, 5, 5), residual=True)
    for changed, message in [
        ({"x": x[0]}, r"x must be \(N, C, H, W\) in channels-last layout, got shape \[16, 5, 5\]"),
        ({"x": x[:0]}, "x must not be empty"),
        ({"x": x.long()}, "no kernel for torch.int64"),
        ({"x": x[:1, :, :1, :1]}, r"training needs more than one value per channel, got shape \[1, 16, 1, 1\]"),
        ({"weight": weight[:3]}, r"weight must be \(16\) float32 on cpu, got \[3\] Float"),
        ({"weight": weight.double()}, r"weight must be .* got \[16\] Double"),
        ({"bias": bias[None]}, r"bias must be \(16\)"),
        ({"running_mean": mean.half()}, "running_mean must be"),
        ({"running_var": var[::2]}, "running_var must be"),
        ({"residual": residual[:2]}, "residual must have the shape, dtype, device and channels-last layout of x"),
        ({"residual": residual.half()}, "residual must have the shape, dtype, device"),
        ({"residual": residual.contiguous()}, "residual must have the shape, dtype, device"),
        ({"impl": "fast"}, 'impl must be "auto", "native" or "reference"'),
    ]:
        arguments = {"x": x, "weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        with pytest.raises(ValueError, match=message):
            batch_norm(**{**arguments, "training": True, "impl": "native", **changed})
