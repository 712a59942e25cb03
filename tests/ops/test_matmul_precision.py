"""NT-Xent under every way of setting PyTorch's float32 matmul precision."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from scan_fast.ops import native

pytestmark = pytest.mark.skipif(not native.is_available(), reason="the compiled module is not built")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

# The settings are global, and PyTorch itself refuses some mixes of them, so the cases run in a separate process.
CODE = """
import sys
import torch
from scan_fast import nt_xent
from scan_fast.ops import native

# What is set, and whether it allows 16-bit products on the CPU and on a GPU.
NO, CPU, BOTH = (False, False), (True, False), (True, True)
MEDIUM = 'torch.set_float32_matmul_precision("medium")'
CASES = {
    'torch.set_float32_matmul_precision("highest")': NO,
    'torch.set_float32_matmul_precision("high")': NO,
    MEDIUM: BOTH,
    'torch.backends.cuda.matmul.allow_tf32 = True': NO,
    'torch.backends.cuda.matmul.fp32_precision = "ieee"': NO,
    'torch.backends.cuda.matmul.fp32_precision = "tf32"': NO,
    'torch.backends.mkldnn.matmul.fp32_precision = "ieee"': NO,
    'torch.backends.mkldnn.matmul.fp32_precision = "tf32"': NO,
    'torch.backends.mkldnn.matmul.fp32_precision = "bf16"': CPU,
    'torch.backends.fp32_precision = "ieee"': NO,
    'torch.backends.fp32_precision = "tf32"': NO,
    'torch.backends.fp32_precision = "bf16"': CPU,
    # Mixed, the later word counts.
    MEDIUM + '; torch.backends.cuda.matmul.fp32_precision = "ieee"': CPU,
    MEDIUM + '; torch.backends.mkldnn.matmul.fp32_precision = "ieee"': NO,
    'torch.backends.cuda.matmul.fp32_precision = "tf32"; ' + MEDIUM: BOTH,
}

def results(device, impl):
    generator = torch.Generator().manual_seed(0)
    z = [torch.randn(600, 128, generator=generator).to(device).requires_grad_() for _ in range(2)]
    loss = nt_xent(*z, 0.1, impl=impl)
    return [x.detach().cpu() for x in (loss, *torch.autograd.grad(loss, z))]

def reset():
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = "none"
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.fp32_precision = "none"

device = sys.argv[1]
info = native.build_info()
rounds = device == "cuda" or info["cpu_gemm_bf16"] or info["cpu_bf16_vectors"]
exact, plain, failed = results("cpu", "reference"), results(device, "native"), 0
for setting, allowed in CASES.items():
    reset()
    exec(setting)
    reduced = allowed[device == "cuda"]
    try:
        ours = results(device, "native")
        for mine, right in zip(ours, exact, strict=True):
            error = float((mine - right).norm() / right.norm())
            assert error <= (1e-2 if reduced else 1e-4), f"error {error}"
        same = all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
        assert same != (reduced and rounds), "the wrong precision"
    except (AssertionError, RuntimeError) as error:
        failed += 1
        print(f"{setting}: {str(error).splitlines()[0]}", file=sys.stderr)
sys.exit(failed > 0)
"""


@pytest.mark.parametrize("device", DEVICES)
def test_nt_xent_follows_the_precision_settings(device: str) -> None:
    result = subprocess.run([sys.executable, "-c", CODE, device], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_nt_xent_in_bfloat16_pairs_follows_the_precision_settings(isa: str) -> None:
    """The products of AVX-512-BF16, computed by float32 instructions if the processor does not have it."""
    environment = {**os.environ, "SCAN_FAST_CPU_BF16": "1", "SCAN_FAST_CPU_ISA": isa}
    command = [sys.executable, "-c", CODE, "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
