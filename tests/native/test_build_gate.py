"""Every CUDA kernel compiles for every supported architecture, without spills, and with matrix instructions.

Without nvcc, only the parsing of its output is tested. ``build_budgets.json`` holds the registers that kernels may
use; ``python tests/native/build_gate.py --record`` rewrites it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import build_gate
import pytest

NVCC = build_gate.find_nvcc()
CUOBJDUMP = build_gate.find_cuobjdump()
BUDGETS = json.loads(build_gate.BUDGETS.read_text())
BUILDS = [
    (source, architecture) for source in build_gate.kernels() for architecture in build_gate.architectures(source)
]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found (set CUDACXX or CUDA_HOME)")
needs_cuobjdump = pytest.mark.skipif(CUOBJDUMP is None, reason="cuobjdump was not found (pip: nvidia-cuda-cuobjdump)")
# Kernels whose source multiplies matrices, by source; they must use the matrix units.
MATRIX = {
    "neighbors/neighbors_cuda.cu": ("search_tiles", "search_finely"),
    "neighbors/neighbors_sm90.cu": ("search_tiles_sm90_kernel",),
    "nt_xent/nt_xent_cuda.cu": ("forward_kernel", "backward_kernel", "weights_kernel", "gather_kernel"),
    "nt_xent/nt_xent_sm90.cu": (
        "forward_sm90_kernel",
        "backward_sm90_kernel",
        "store_weights_sm90_kernel",
        "gather_sm90_kernel",
    ),
}

NAME = "_ZN9scan_fast48_GLOBAL__N__c952af28_15_nt_xent_cuda_cu_c644615815backward_kernelILb0ELb1EEEvPKfi"
LOG = f"""
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{NAME}' for 'sm_80'
ptxas info    : Function properties for {NAME}
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 242 registers, used 1 barriers, 128 bytes smem, 464 bytes cmem[0]
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'f'
ptxas info    : Compiling entry function '_ZN9scan_fast5plainEv' for 'sm_80'
ptxas info    : Function properties for _ZN9scan_fast5plainEv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 18 registers, used 0 barriers, 448 bytes cmem[0]
"""


def build(source: str, architecture: str) -> dict[str, Any]:
    assert NVCC is not None
    found = build_gate.compiled_for_the_module(source, architecture, NVCC)
    return build_gate.compile_kernel(source, architecture, NVCC) if found is None else found


def test_reads_what_the_compiler_says() -> None:
    result = build_gate.parse(LOG, "80")
    spilled, plain = result["kernels"].values()
    assert spilled == {"registers": 242, "smem": 128, "stack": 24, "spills": 20}
    assert plain == {"registers": 18, "smem": 0, "stack": 0, "spills": 0}
    assert len(result["warnings"]) == 1 and "C7510" in result["warnings"][0]
    assert "backward_kernel" in next(iter(result["kernels"]))
    assert "c952af28" not in "".join(result["kernels"])


def test_reads_one_of_several_architectures() -> None:
    both = LOG + LOG.replace("sm_80", "sm_100").replace("242", "168")
    registers = {arch: build_gate.parse(both, arch)["kernels"]["plain"]["registers"] for arch in ("80", "100")}
    assert registers == {"80": 18, "100": 18}
    largest = {
        arch: max(k["registers"] for k in build_gate.parse(both, arch)["kernels"].values()) for arch in registers
    }
    assert largest == {"80": 242, "100": 168}
    assert build_gate.parse(both, "90a")["kernels"] == {}


@needs_nvcc
@pytest.mark.slow
def test_what_the_build_of_the_module_keeps(tmp_path: Path) -> None:
    assert NVCC is not None
    source = "neighbors/neighbors_sm90.cu"
    alone = build_gate.compile_kernel(source, "90a", NVCC)
    folder = tmp_path / "build" / "any" / "CMakeFiles" / "scan_fast_sm90.dir" / "csrc" / "neighbors"
    folder.mkdir(parents=True)
    binary = folder / "neighbors_sm90.cu.o"
    options = [*build_gate.FLAGS, build_gate.gencode("90a"), f"-I{build_gate.CSRC}"]
    compiled = [str(NVCC), *options, "-c", str(build_gate.CSRC / source), "-o", str(binary)]
    facts = [sys.executable, str(build_gate.CSRC / "build_facts.py"), "compile"]
    subprocess.run([*facts, *compiled], check=True, capture_output=True)
    found = build_gate.compiled_for_the_module(source, "90a", NVCC, tmp_path)
    assert found is not None and found["kernels"] == alone["kernels"] and found["object"] == str(binary)
    assert build_gate.compiled_for_the_module(source, "80", NVCC, tmp_path) is None
    record = binary.with_name(binary.name + ".json")
    content = json.loads(record.read_text())
    for changed in (
        {"source_hash": "0" * 16},
        {"compiler": "another"},
        {"command": [*content["command"], "-DSCAN_FAST_WAIT_LIMIT=1"]},
        {"command": [option for option in content["command"] if option != "-O3"]},
    ):
        record.write_text(json.dumps(content | changed))
        assert build_gate.compiled_for_the_module(source, "90a", NVCC, tmp_path) is None, changed


def test_a_budget_is_a_budget() -> None:
    used = {"registers": 100, "smem": 64, "stack": 0, "spills": 0}
    assert build_gate.over_budget(used, {}, "80") == ["registers 100, allowed 64"]
    assert build_gate.over_budget(used, {"80": 104}, "80") == []
    assert build_gate.over_budget(used, {"80": 104}, "90a") == ["registers 100, allowed 64"]
    assert build_gate.over_budget(used | {"stack": 8}, {"80": 104}, "80") == ["stack 8, allowed 0"]
    assert build_gate.over_budget(used | {"stack": 8}, {"80": 104, "stack": 8, "reason": "a table"}, "80") == []


def test_every_exception_has_a_reason() -> None:
    for source, entries in BUDGETS.items():
        for name, entry in entries.items():
            if "stack" in entry or "spills" in entry:
                assert entry.get("reason"), f"{source} {name}"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize(("source", "architecture"), BUILDS)
def test_registers_shared_memory_and_spills(source: str, architecture: str) -> None:
    result = build(source, architecture)
    assert result["kernels"], "no kernel was compiled"
    assert result["warnings"] == []
    budgets = BUDGETS.get(source, {})
    excess = {
        name: found
        for name, measured in result["kernels"].items()
        if (found := build_gate.over_budget(measured, budgets.get(name, {}), architecture))
    }
    assert not excess, "if this is intended: python tests/native/build_gate.py --record"


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", [source for source in build_gate.kernels() if source.endswith(build_gate.SM90)])
def test_a_limit_to_waiting_costs_no_spills(source: str) -> None:
    """Debug builds and the GPU suite's module give up a wait after two seconds; they must be the same kernels."""
    assert NVCC is not None
    limited = build_gate.compile_kernel(source, "90a", NVCC, ("SCAN_FAST_WAIT_LIMIT",))
    assert limited["warnings"] == []
    assert set(limited["kernels"]) == set(build(source, "90a")["kernels"])
    budgets = BUDGETS.get(source, {})
    for name, measured in limited["kernels"].items():
        assert build_gate.over_budget(measured, budgets.get(name, {}), "90a") == [], name
    if CUOBJDUMP is not None:
        plain = build_gate.sass(build(source, "90a")["object"], "90a", CUOBJDUMP)
        assert "GLOBALTIMER" not in plain and "BPT.TRAP" not in plain, "a wait has a limit that was not asked for"
        with_limit = build_gate.sass(limited["object"], "90a", CUOBJDUMP)
        assert "GLOBALTIMER" in with_limit and "BPT.TRAP" in with_limit, "no wait has a limit"


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize(("source", "architecture"), BUILDS)
def test_machine_code(source: str, architecture: str) -> None:
    assert CUOBJDUMP is not None
    built = build(source, architecture)
    counts = build_gate.instructions(built["object"], architecture, CUOBJDUMP)
    assert set(counts) == set(built["kernels"])
    budgets = BUDGETS.get(source, {})
    for name, ops in counts.items():
        if "stack" not in budgets.get(name, {}):
            assert ops["LDL"] == ops["STL"] == 0, f"{name} uses local memory"
        if name.split("<")[0].startswith(MATRIX.get(source, ())):
            multiplies, copies = ("HGMMA", "UBLKCP") if source.endswith(build_gate.SM90) else ("HMMA", "LDGSTS")
            assert ops[multiplies] > 0, f"{name} multiplies without {multiplies}"
            assert ops[copies] > 0, f"{name} lost its asynchronous copies"
            # One election chooses the thread that copies. An election per copy would be a loop around each copy, which
            # the compiler writes if it does not see that the operands are the same in the whole warp.
            assert ops["ELECT"] == (1 if source.endswith(build_gate.SM90) else 0), f"{name} copies in loops"
            assert ops["LDSM"] > 0 or source.endswith(build_gate.SM90), f"{name} lost its matrix loads"


def whole_text(source: str) -> str:
    """Return a CUDA source and the parts of it (.cuh) that it includes."""
    text = (build_gate.CSRC / source).read_text()
    return text + "".join(map(whole_text, re.findall(r'^#include "(\S+\.cuh)"', text, re.MULTILINE)))


def test_matrix_kernels_are_named_in_their_sources() -> None:
    multiplying = {s for s in build_gate.kernels() if re.search(r"\bw?g?mma(_16816)?<", whole_text(s))}
    assert multiplying == set(MATRIX) & set(build_gate.kernels())


def test_nothing_waits_for_the_device_or_allocates_behind_torch() -> None:
    """CUDA graphs need this: memory comes from torch's allocator, and no call waits for a result of the device."""
    forbidden = r"cuda(?:Malloc|Free|HostAlloc|StreamSynchronize|DeviceSynchronize|EventSynchronize)\w*|cudaMemcpy\("
    sources = [path for kind in ("*.cu", "*.cuh", "*_op.cpp") for path in build_gate.CSRC.rglob(kind)]
    sources += [build_gate.CSRC / "common" / "device.h"]
    found = {path.name: re.findall(forbidden + r"|\.item\b|\.cpu\(\)", path.read_text()) for path in sources}
    assert len(sources) > 15 and not {name: calls for name, calls in found.items() if calls}


@needs_nvcc
@needs_cuobjdump
@pytest.mark.slow
def test_kernels_that_may_start_early_wait_before_they_access_memory() -> None:
    """csrc/nt_xent/cuda_plan.cuh, launch_next: the compiler must not move an access in front of the wait."""
    assert CUOBJDUMP is not None
    code = build_gate.sass(build("nt_xent/nt_xent_sm90.cu", "90a")["object"], "90a", CUOBJDUMP)
    blocks = re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]
    assert blocks
    for block in blocks:
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", block)
        accesses = [at for at, name in enumerate(names) if name in {"LD", "LDG", "LDGSTS", "ST", "STG", "UBLKCP"}]
        assert accesses and names.index("ACQBULK") < min(accesses), block.partition("\n")[0]
