"""Tell CMake what only Python knows.

``build_facts.py torch`` prints facts about the PyTorch that this interpreter imports, as JSON.
``build_facts.py hashes FILE [NAME ...]`` writes the hashes of the CUDA sources as C++, for csrc/bindings.cpp, without
those of the named sources, which are not built.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import sysconfig
from pathlib import Path

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


def source_hashes(without: set[str]) -> str:
    """Return C++ that defines kSourceHashes, the hash of each compiled CUDA source by the name of the source."""
    # By its file: the package itself would load the module that is being built.
    spec = importlib.util.spec_from_file_location("gpu_status", CSRC.parent / "scan_fast" / "gpu_status.py")
    assert spec is not None and spec.loader is not None
    gpu_status = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_status)
    pairs = "".join(
        f'    {{"{name}", "{gpu_status.source_hash(CSRC, path)}"}},\n'
        for name, path in gpu_status.kernels_of(CSRC).items()
        if name not in without
    )
    # The last pair is no source: an array cannot be empty.
    return f'constexpr const char* kSourceHashes[][2] = {{\n{pairs}    {{"", ""}},\n}};\n'


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        print(json.dumps(torch_facts()))
    else:
        Path(sys.argv[2]).write_text(source_hashes(set(sys.argv[3:])))
