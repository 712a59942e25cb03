"""Matrix products of MKL, which CPU kernels use on some processors, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scan_fast.ops import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiled module")

sizes = st.integers(1, 130)


@settings(max_examples=60, deadline=None)
@given(
    m=sizes,
    n=st.one_of(sizes, st.integers(380, 400)),
    k=st.one_of(sizes, st.integers(250, 520)),
    layout=st.sampled_from(["nn", "nt", "tn"]),
    kernel=st.sampled_from(["float32", "bfloat16"]),
    beta=st.sampled_from([0.0, 1.0, -0.5]),
    padding=st.integers(0, 3),
)
def test_matches_float64(m: int, n: int, k: int, layout: str, kernel: str, beta: float, padding: int) -> None:
    if kernel == "bfloat16" and not native._C.build_info()["cpu_gemm_bf16"]:
        return
    if not torch.backends.mkl.is_available():
        pytest.skip("PyTorch was built without MKL")
    generator = torch.Generator().manual_seed(m * 1000003 + n * 1009 + k)
    dtype = torch.bfloat16 if kernel == "bfloat16" else torch.float32

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns + padding, generator=generator).to(dtype)[:, :columns]

    a = matrix(k, m) if layout == "tn" else matrix(m, k)
    b = matrix(n, k) if layout == "nt" else matrix(k, n)
    storage = torch.randn(m, n + padding, generator=generator)
    if beta == 0:
        storage[:, :n] = torch.nan  # beta == 0 must not read C
    before = storage.clone()
    c = storage[:, :n]
    product = (a.T if layout == "tn" else a).double() @ (b.T if layout == "nt" else b).double()
    expected = 1.5 * product if beta == 0 else 1.5 * product + beta * c.double()
    native._C.gemm(a, b, c, layout, 1.5, beta)
    torch.testing.assert_close(c.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.equal(storage[:, n:], before[:, n:])
