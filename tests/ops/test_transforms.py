"""Forward-mode derivatives of the losses, and torch.compile with symbolic sizes and settings."""

from collections.abc import Callable

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from scan_fast import nt_xent, scan_loss, self_label_loss
from scan_fast.errors import UsageError
from scan_fast.ops import native
from scan_fast.ops.batch_norm import batch_norm
from scan_fast.ops.dispatch import Impl

needs_native = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")

Loss = Callable[[Tensor, Tensor, float, Impl], Tensor]


def _scan(x: Tensor, y: Tensor, setting: float, impl: Impl) -> Tensor:
    return torch.stack(scan_loss(x, y, 10 * setting, impl=impl))


def _self_label(x: Tensor, y: Tensor, setting: float, impl: Impl) -> Tensor:
    return self_label_loss(x, y, setting, impl=impl)[0]


def _nt_xent(x: Tensor, y: Tensor, setting: float, impl: Impl) -> Tensor:
    return nt_xent(x, y, setting, reduction="none", impl=impl)


LOSSES = [_scan, _self_label, _nt_xent]


def _draw(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x, y, dx, dy = (3 * torch.randn(rows, 4, generator=generator) for _ in range(4))
    return x, y, dx, dy


@needs_native
@pytest.mark.parametrize("loss", LOSSES)
def test_forward_mode_gives_the_directional_derivative(loss: Loss) -> None:
    """The kernels have no forward mode, so the reference computes; a difference quotient in float64 is the oracle."""
    x, y, dx, dy = _draw(6)
    step = 1e-6
    ahead, behind = (loss(x.double() + e * dx, y.double() + e * dy, 0.3, "reference") for e in (step, -step))
    exact = (ahead - behind) / (2 * step)
    assert exact.abs().max() > 0.01
    by_jvp = torch.func.jvp(lambda a, b: loss(a, b, 0.3, "auto"), (x, y), (dx, dy))[1]
    with fwAD.dual_level():
        by_dual = fwAD.unpack_dual(loss(fwAD.make_dual(x, dx), fwAD.make_dual(y, dy), 0.3, "auto")).tangent
    for tangent in (by_jvp, by_dual):
        torch.testing.assert_close(tangent.double(), exact, rtol=1e-4, atol=1e-4)


@needs_native
@pytest.mark.parametrize("loss", LOSSES)
def test_native_kernels_refuse_forward_mode(loss: Loss) -> None:
    x, y, dx, _ = _draw(6)
    message = 'impl="native" has no forward-mode derivatives for .*_forward; use "auto" or "reference"'
    with pytest.raises(UsageError, match=message), fwAD.dual_level():
        loss(fwAD.make_dual(x, dx), y, 0.3, "native")
    assert torch.equal(loss(x, y, 0.3, "native"), loss(x, y, 0.3, "auto"))  # outside of the level as ever


@needs_native
def test_batch_norm_has_forward_mode_derivatives() -> None:
    x, dx = (torch.randn(4, 32, 3, 3).to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.rand(32) + 1, torch.randn(32)

    def norm(x: Tensor) -> Tensor:
        return batch_norm(x, weight.to(x.dtype), bias.to(x.dtype), None, None, training=True)

    exact = (norm(x.double() + 1e-6 * dx) - norm(x.double() - 1e-6 * dx)) / 2e-6
    torch.testing.assert_close(torch.func.jvp(norm, (x,), (dx,))[1].double(), exact, rtol=1e-3, atol=1e-3)


@needs_native
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("loss", LOSSES)
def test_compiles_with_symbolic_sizes_and_settings(loss: Loss, dynamic: bool | None) -> None:
    """Without ``dynamic``, sizes and settings become symbolic at the second call."""

    def step(x: Tensor, y: Tensor, setting: float) -> Tensor:
        return loss(2 * x, y, setting, "native").sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, setting in ((5, 0.3), (6, 0.4), (9, 0.55)):
        results = []
        for function in (compiled, step):
            x, y = (z.requires_grad_() for z in _draw(rows)[:2])
            value = function(x, y, setting)
            value.backward()
            results.append((value.detach(), x.grad, y.grad))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("setting", [float("nan"), float("inf"), -float("inf")])
def test_settings_that_are_not_finite_raise(setting: float) -> None:
    x, y, *_ = _draw(3)
    with pytest.raises(ValueError, match="entropy_weight must be a finite number"):
        scan_loss(x, y, setting)
    with pytest.raises(ValueError, match="temperature must be finite and at least 1e-8"):
        nt_xent(x, y, setting)
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\]"):
        self_label_loss(x, y, setting)
