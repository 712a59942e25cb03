"""Operators called past Python's checks: each call of a list of wrong ones raises, and says which argument is wrong."""

from __future__ import annotations

import pytest
import torch
from hostile_calls import CALLS
from operator_cases import CASES, operator_of

from scan_fast.ops import batch_norm, convolution, native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
NEEDS_CONVOLUTION = {"kernel larger than the image", "weight without memory", "negative sizes", "huge stride"}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call_names_the_argument(name: str) -> None:
    if name in NEEDS_CONVOLUTION and not convolution.is_usable("cpu"):
        pytest.skip("no bfloat16 convolutions on this processor")
    function, message = CALLS[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        function()


def test_every_operator_has_a_case() -> None:
    prefix = "scan_fast::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert set(CASES) == names


def meta(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("scan_loss_forward", (meta(3, 4), meta(5, 4), 2.0), "neighbors must have the shape of anchors"),
        ("self_label_forward", (meta(3, 4), meta(3, 5), 0.5, True), "strong must have the shape of weak"),
        ("nt_xent_forward", (meta(3, 4), meta(2, 4), 0.1, True, 0, 3), "z0 and z1 must have one shape"),
        ("topk_neighbors", (meta(3, 4), meta(3, 5), 1, True, False), "queries must have 5 columns"),
        ("batch_norm_forward", (meta(3, 4), None, *[meta(4)] * 4, True, 0.1, 1e-5, True, False), "x must be"),
        ("conv2d_forward", (meta(3, 32, 4, 4), meta(32, 16, 3, 3), 1, 0), "x must be .* and weight"),
        ("conv2d_grad_weight", (meta(3, 32), meta(3, 32, 4, 4), 3, 1, 0), "grad_y and x must be images"),
        (
            "augment",
            (meta(2, 3, 3), None, meta(2, 9, dtype=torch.int32), 4, [1.0] * 3, [0.0] * 3, torch.float32),
            "images must be",
        ),
    ],
)
def test_fake_kernels_refuse_wrong_shapes(name: str, arguments: tuple[object, ...], message: str) -> None:
    assert batch_norm and convolution  # importing them registers their fake kernels
    with pytest.raises(ValueError, match=message):
        operator_of(name)(*arguments)
