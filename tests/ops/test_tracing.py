"""The trace of kernel launches: readable names, and nothing on the CPU."""

import re
from pathlib import Path

import pytest
import torch

from scan_fast import gpu_status, scan_loss
from scan_fast.ops import native
from scan_fast.ops.tracing import short_name, trace_launches

CSRC = Path(__file__).resolve().parents[2] / "csrc"


@pytest.mark.parametrize(
    "signature, name",
    [
        ("void scan_fast::(anonymous namespace)::prepare_kernel<float>(float const*, int)", "prepare_kernel<float>"),
        ("void scan_fast::(anonymous namespace)::k<(bool)1, (scan_fast::Kind)2>(int)", "k<1, 2>"),
        ("scan_fast::(anonymous namespace)::finish(float*)", "finish"),
        ("unknown kernel", "unknown kernel"),
    ],
)
def test_names_are_short(signature: str, name: str) -> None:
    assert short_name(signature) == name


def test_only_sm90_kernels_have_sm90_in_their_names() -> None:
    # The GPU suite relies on this.
    for name, path in gpu_status.kernels_of(CSRC).items():
        texts = [path.read_text()]
        texts += [h.read_text() for h in path.parent.glob("sm90_*.cuh")] if name.endswith("_sm90") else []
        bounds = r"__global__\s+void\s+(?:__launch_bounds__\(.*?\)\s+)?(\w+)\("
        kernels = [kernel for text in texts for kernel in re.findall(bounds, text, re.DOTALL)]
        if name.endswith("_sm90"):
            assert any("sm90" in kernel for kernel in kernels), name
        else:
            assert not any("sm90" in kernel for kernel in kernels), name


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))],
)
def test_a_trace_lists_the_kernels_of_a_gpu(device: str) -> None:
    logits = torch.randn(8, 5, device=device)
    with trace_launches() as names:
        scan_loss(logits, logits.flip(0))
    if device == "cpu" or not native.is_available():
        assert names == []
    else:
        assert names and all(re.fullmatch(r"\w+(<.*>)?", name) for name in names)
        with trace_launches() as again:
            pass
        assert again == []


@pytest.mark.skipif(not native.is_available(), reason="scan_fast._C is not built")
def test_the_module_names_the_sources_it_was_built_from() -> None:
    info = native.build_info()
    present = {name: gpu_status.source_hash(CSRC, path) for name, path in gpu_status.kernels_of(CSRC).items()}
    if info["cuda"] is None:
        assert info["sources"] == {}
    else:
        architectures = info["cuda_architectures"].split()
        assert info["sources"] == {
            name: digest for name, digest in present.items() if "90a" in architectures or not name.endswith("_sm90")
        }
