"""Read what the CUDA compiler says about every kernel for every supported architecture; needs no GPU.

The build of the module keeps it. What the module was not built for, or from other sources, is compiled here.

``python tests/native/build_gate.py --record`` writes the registers of the present build, rounded up to the hardware's
allocation unit, as budgets by architecture into ``build_budgets.json``. Kernels with few registers need no entry. An
entry may also hold ``"smem"``, or ``"stack"`` and ``"spills"`` with a ``"reason"``; these are kept. Objects compiled
here are cached in ``build/build-gate`` by the hash of the source, its headers, the flags and the compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "build-gate"
BUDGETS = Path(__file__).with_name("build_budgets.json")
ARCHITECTURES = ("80", "90a", "100")
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v")
SM90 = "_sm90.cu"  # suffix of sources for sm_90a only
INTERESTING = ("HMMA", "HGMMA", "LDGSTS", "LDSM", "UBLKCP", "ELECT", "MUFU", "LDL", "STL")  # see instructions()
# Limits of a kernel without an entry: registers with which a multiprocessor still holds 1,024 threads, static shared
# memory, no stack frame and no spills.
DEFAULT = {"registers": 64, "smem": 20 << 10, "stack": 0, "spills": 0}
# Warnings of ptxas about lost overlap or ignored instructions: C7508, C7510, C7511, C7515 and similar ones.
SERIALIZED = re.compile(r"^.*\bC75\d\d\b.*$", re.MULTILINE)


def find_nvcc() -> Path | None:
    """Return nvcc: CUDACXX, CUDA_HOME, the PATH, or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    candidates = [
        os.environ.get("CUDACXX"),
        home and f"{home}/bin/nvcc",
        shutil.which("nvcc"),
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def find_cuobjdump() -> Path | None:
    """Return cuobjdump: the PATH, the toolkit, the pip package nvidia-cuda-cuobjdump, or the copy in Triton."""
    site = Path(sysconfig.get_paths()["purelib"])
    candidates = [shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump", *site.glob("nvidia/**/bin/cuobjdump")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.submodule_search_locations:
        candidates.append(Path(triton.submodule_search_locations[0]) / "backends" / "nvidia" / "bin" / "cuobjdump")
    return next((Path(path) for path in candidates if path and Path(path).is_file()), None)


def kernels() -> list[str]:
    """Return the CUDA sources of the module, relative to csrc/."""
    from scan_fast.ops.families import GPU_FAMILIES

    return [f"{source}.cu" for family in GPU_FAMILIES for source in (family.portable, family.sm90) if source]


def architectures(source: str) -> tuple[str, ...]:
    """Return the architectures that a source is compiled for."""
    return ("90a",) if source.endswith(SM90) else ARCHITECTURES


def demangled(text: str) -> str:
    """Replace mangled names in a text. File hashes within anonymous namespaces go, too: names must be stable."""
    text = re.sub(r"\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}", "12_GLOBAL__N_1", text)
    filt = shutil.which("c++filt")
    return subprocess.run([filt], input=text, capture_output=True, text=True, check=True).stdout if filt else text


def short_name(signature: str) -> str:
    """``void scan_fast::(anonymous namespace)::k<true>(float*)`` becomes ``k<true>``, as in a trace of launches."""
    from scan_fast.ops import tracing

    return tracing.short_name(signature)


def gencode(architecture: str) -> str:
    """Return the option that makes nvcc compile for an architecture alone."""
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


def version_of(nvcc: Path) -> str:
    """Return what a compiler says about its version."""
    return subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout


def compiled_for_the_module(source: str, architecture: str, nvcc: Path, root: Path = ROOT) -> dict[str, Any] | None:
    """Return :func:`compile_kernel`'s result from a build of the module.

    None if there is no such build of the present source with this compiler, these flags and this architecture.
    """
    from scan_fast.gpu_status import source_hash

    for path in root.glob(f"build/*/CMakeFiles/scan_fast_*.dir/csrc/{source}.o.json"):
        facts = json.loads(path.read_text())
        command = facts["command"]
        if (
            facts["source_hash"] == source_hash(CSRC, CSRC / source)
            and facts["compiler"] == version_of(nvcc)
            and {*FLAGS, gencode(architecture)} <= set(command)
            and not any("SCAN_FAST_WAIT_LIMIT" in argument for argument in command)
        ):
            return parse(facts["messages"], architecture) | {"object": str(path.with_suffix(""))}
    return None


def compile_kernel(source: str, architecture: str, nvcc: Path, defines: tuple[str, ...] = ()) -> dict[str, Any]:
    """Compile one source for one architecture.

    Args:
        source: Path relative to csrc/.
        architecture: As in ``ARCHITECTURES``.
        nvcc: The compiler.
        defines: Names of macros to define.

    Returns:
        ``{"kernels": {name: {"registers", "smem", "stack", "spills"}}, "warnings": [line], "object": path}``, bytes.
    """
    from scan_fast.gpu_status import source_hash

    version = version_of(nvcc)
    flags = (*FLAGS, *(f"-D{name}" for name in defines))
    parts = (source, source_hash(CSRC, CSRC / source), architecture, *flags, version)
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]
    prefix = "-".join((Path(source).stem, architecture, *defines))
    name = f"{prefix}-{key}"
    record, binary = CACHE / f"{name}.json", CACHE / f"{name}.o"
    if record.exists() and binary.exists():
        cached: dict[str, Any] = json.loads(record.read_text())
        return cached | {"object": str(binary)}
    CACHE.mkdir(parents=True, exist_ok=True)
    for old in CACHE.glob(f"{prefix}-{'[0-9a-f]' * len(key)}.*"):
        old.unlink()
    command = [str(nvcc), *flags, gencode(architecture), f"-I{CSRC}", "-c", str(CSRC / source), "-o", str(binary)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if finished.returncode != 0:
        raise RuntimeError(f"{source} does not compile for sm_{architecture}:\n{finished.stderr[-4000:]}")
    result = parse(finished.stdout + finished.stderr, architecture)
    record.write_text(json.dumps(result, indent=1))
    return result | {"object": str(binary)}


def parse(log: str, architecture: str) -> dict[str, Any]:
    """Read what ``nvcc -Xptxas=-v`` said about one of the architectures it compiled for."""
    found: dict[str, dict[str, int]] = {}
    blocks = re.split(r"^ptxas info\s*: Compiling entry function ", demangled(log), flags=re.MULTILINE)
    for block in blocks[1:]:
        signature, _, rest = block.partition("' for '")
        signature = signature.lstrip("'")
        if not rest.startswith(f"sm_{architecture}'"):
            continue

        def number(pattern: str, text: str = block) -> int:
            match = re.search(pattern, text)
            return int(match[1]) if match else 0

        found[short_name(signature)] = {
            "registers": number(r"Used (\d+) registers"),
            "smem": number(r"(\d+) bytes smem"),
            "stack": number(r"(\d+) bytes stack frame"),
            "spills": number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
        }
    return {"kernels": found, "warnings": sorted(set(SERIALIZED.findall(log)))}


def sass(binary: str, architecture: str, cuobjdump: Path) -> str:
    """Return the machine code of an object for one architecture, as text."""
    command = [str(cuobjdump), "--dump-sass", "--gpu-architecture", f"sm_{architecture}", binary]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def instructions(binary: str, architecture: str, cuobjdump: Path) -> dict[str, dict[str, int]]:
    """Return, per kernel, how often each of ``INTERESTING`` occurs in the machine code."""
    counts: dict[str, dict[str, int]] = {}
    for block in re.split(r"^\s*Function : ", sass(binary, architecture, cuobjdump), flags=re.MULTILINE)[1:]:
        name, _, code = block.partition("\n")
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", code)
        wanted = {op: names.count(op) for op in INTERESTING}
        counts[short_name(demangled(name.strip()).strip())] = wanted
    return counts


def over_budget(measured: dict[str, int], entry: dict[str, Any], architecture: str) -> list[str]:
    """Return the values that exceed a kernel's budget, each with the limit."""
    limits = DEFAULT | {key: entry[key] for key in ("smem", "stack", "spills") if key in entry}
    limits["registers"] = entry.get(architecture, DEFAULT["registers"])
    return [f"{key} {value}, allowed {limits[key]}" for key, value in measured.items() if value > limits[key]]


def record() -> None:
    """Write the registers of the present build as budgets."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("nvcc was not found")
    before = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    blocks = []
    for source in kernels():
        built = {arch: compile_kernel(source, arch, nvcc)["kernels"] for arch in architectures(source)}
        lines = []
        for name in sorted({name for of_arch in built.values() for name in of_arch}):
            registers = {arch: -(-of_arch[name]["registers"] // 8) * 8 for arch, of_arch in built.items()}
            kept = {key: v for key, v in before.get(source, {}).get(name, {}).items() if key not in ARCHITECTURES}
            entry = {arch: count for arch, count in registers.items() if count > DEFAULT["registers"]} | kept
            if entry:
                lines.append(f"  {json.dumps(name)}: {json.dumps(entry)}")
        blocks.append(f" {json.dumps(source)}: {{\n" + ",\n".join(lines) + "\n }")
    BUDGETS.write_text("{\n" + ",\n".join(blocks) + "\n}\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    record()
