"""Tell CMake what only Python knows, and keep what the CUDA compiler says.

``build_facts.py torch`` prints facts about the PyTorch that this interpreter imports, as JSON.
``build_facts.py hashes FILE [NAME ...]`` writes the hashes of the CUDA sources as C++, for csrc/bindings.cpp, without
those of the named sources, which are not built.
``build_facts.py compile COMPILER ARGUMENT ...`` compiles a CUDA source and writes what the compiler said about its
kernels to OBJECT.json, for tests/native/build_gate.py.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

CSRC = Path(__file__).resolve().parent


def torch_facts() -> dict[str, str]:
    """Return what a module needs in order to be compiled against PyTorch; lists are separated by semicolons."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    include_dirs = cpp_extension.include_paths()
    if torch.version.cuda is not None:
        # torch's own headers need CUDA's, and a toolkit that is only a compiler lacks some of them, e.g. cusparse.h.
        major = torch.version.cuda.split(".")[0]
        headers = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / f"cu{major}" / "include"
        include_dirs += [str(headers)] if headers.is_dir() else []
    return {
        "version": torch.__version__,
        "include_dirs": ";".join(include_dirs),
        "library_dirs": ";".join(cpp_extension.library_paths()),
        "cxx11_abi": str(int(torch.compiled_with_cxx11_abi())),
        "pybind11_dir": pybind11.get_cmake_dir(),
    }


def gpu_status_module() -> ModuleType:
    """Return scan_fast/gpu_status.py, loaded by its file: the package would load the module that is being built."""
    spec = importlib.util.spec_from_file_location("gpu_status", CSRC.parent / "scan_fast" / "gpu_status.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def source_hashes(without: set[str]) -> str:
    """Return C++ that defines kSourceHashes, the hash of each compiled CUDA source by the name of the source."""
    gpu_status = gpu_status_module()
    pairs = "".join(
        f'    {{"{name}", "{gpu_status.source_hash(CSRC, path)}"}},\n'
        for name, path in gpu_status.kernels_of(CSRC).items()
        if name not in without
    )
    # The last pair is no source: an array cannot be empty.
    return f'constexpr const char* kSourceHashes[][2] = {{\n{pairs}    {{"", ""}},\n}};\n'


def compile_source(command: list[str]) -> int:
    """Run the command of a CUDA compiler, write OBJECT.json, and return the compiler's exit status."""
    source = Path(command[command.index("-c") + 1])
    record = Path(command[command.index("-o") + 1] + ".json")
    record.unlink(missing_ok=True)
    source_hash = gpu_status_module().source_hash(CSRC, source)  # before: the source may be edited meanwhile
    finished = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(finished.stdout, end="")
    if finished.returncode == 0:
        compiler = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=True).stdout
        facts = {"source_hash": source_hash, "compiler": compiler, "command": command, "messages": finished.stdout}
        record.write_text(json.dumps(facts))
    return finished.returncode


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        print(json.dumps(torch_facts()))
    elif sys.argv[1] == "compile":
        sys.exit(compile_source(sys.argv[2:]))
    else:
        Path(sys.argv[2]).write_text(source_hashes(set(sys.argv[3:])))
