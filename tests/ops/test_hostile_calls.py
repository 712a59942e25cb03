"""Operators called past Python's checks: each call of a list of wrong ones raises, and says which argument is wrong."""

from __future__ import annotations

import pytest
import torch
from hostile_calls import CALLS
from operator_cases import CASES

from scan_fast.ops import native
from scan_fast.ops.convolution import is_usable

pytestmark = pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
NEEDS_CONVOLUTION = {"kernel larger than the image", "weight without memory", "negative sizes", "huge stride"}


@pytest.mark.parametrize("name", CALLS)
def test_wrong_call_names_the_argument(name: str) -> None:
    if name in NEEDS_CONVOLUTION and not is_usable("cpu"):
        pytest.skip("no bfloat16 convolutions on this processor")
    function, message = CALLS[name]
    with pytest.raises((ValueError, RuntimeError), match=message):
        function()


def test_every_operator_has_a_case() -> None:
    prefix = "scan_fast::"
    names = {name.removeprefix(prefix) for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert set(CASES) == names
