"""The tile products behind the CPU kernels: MKL's and our own, against float64."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

_C = pytest.importorskip("scan_fast._C")

sizes = st.integers(1, 130)


@settings(max_examples=60, deadline=None)
@given(
    m=sizes,
    n=st.one_of(sizes, st.integers(380, 400)),
    k=st.one_of(sizes, st.integers(250, 520)),
    transpose_b=st.booleans(),
    portable=st.booleans(),
    beta=st.sampled_from([0.0, 1.0, -0.5]),
    padding=st.integers(0, 3),
)
def test_matches_float64(m, n, k, transpose_b, portable, beta, padding):
    generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
    a = torch.randn(m, k + padding, generator=generator)[:, :k]
    b_shape = (n, k) if transpose_b else (k, n)
    b = torch.randn(b_shape[0], b_shape[1] + padding, generator=generator)[:, : b_shape[1]]
    storage = torch.randn(m, n + padding, generator=generator)
    if beta == 0:
        storage[:, :n] = torch.nan  # beta == 0 must not read C
    before = storage.clone()
    c = storage[:, :n]
    product = a.double() @ (b.T if transpose_b else b).double()
    expected = 1.5 * product if beta == 0 else 1.5 * product + beta * c.double()
    _C.gemm(a, b, c, transpose_b, 1.5, beta, portable)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(storage[:, n:], before[:, n:])


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(isa):
    """The environment variables lower the instruction set and leave MKL out; the product stays the same."""
    code = """
import torch
from scan_fast import _C
info = _C.build_info()
assert info["cpu_gemm"] == "portable" and not info["cpu_gemm_bf16"], info
torch.manual_seed(0)
a, b, c = torch.randn(101, 300), torch.randn(401, 300), torch.empty(101, 401)
_C.gemm(a, b, c, True, 1.0, 0.0, False)
print(info["cpu_isa"], float((c - a.double() @ b.T.double()).abs().max()))
"""
    environment = {**os.environ, "SCAN_FAST_CPU_ISA": isa, "SCAN_FAST_CPU_GEMM": "portable"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    used, error = result.stdout.split()
    assert used in ("baseline", "avx2", "avx512")[: ("baseline", "avx2", "avx512").index(isa) + 1]
    assert float(error) < 1e-4
