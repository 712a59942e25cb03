"""Kernel families: the table of their names, operators and sources.

``families.json`` is the only list of native sources. CMake reads it to build the module and the C++ tests, and this
module reads it for Python. To add a family, add a folder to csrc/, an entry to the file, a module to ``scan_fast/ops``
and tests. This module imports nothing of the package, so that it can be loaded by its file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROLES = {
    "op": "torch-facing layer: argument checks, allocation, dispatch",
    "cpu": "CPU kernels",
    "isa": "CPU inner loops, compiled once per instruction set (csrc/common/cpu_dispatch.h)",
    "amx": "CPU kernels compiled with AMX",
    "amx_avx512": "CPU kernels compiled with AMX and AVX-512",
    "cuda": "CUDA kernels for every GPU, one source at most",
    "sm90": "CUDA kernels for sm_90a, one source at most",
}
"""Ways to compile a source. Only sources with the role ``op`` include torch headers."""


@dataclass(frozen=True)
class Family:
    """Kernels of one operation.

    Attributes:
        name: name of the family and of its folder in csrc/.
        operator: entry operator in ``torch.ops.scan_fast``; a build has the family's kernels for a device if this
            operator has one.
        function: name of the operation in ``scan-fast info``.
        reference: function or class that computes the same result, and runs if the kernels cannot.
        sources: file names in the family's folder by role, see :data:`ROLES`.
        cpu_options: additional compiler options of the CPU sources.
        cpu_requires: entry of the compiled module's ``build_info()`` without which the CPU kernels cannot run, or None.
    """

    name: str
    operator: str
    function: str
    reference: str
    sources: Mapping[str, tuple[str, ...]]
    cpu_options: tuple[str, ...] = ()
    cpu_requires: str | None = None

    @property
    def portable(self) -> str | None:
        """CUDA source that every GPU can run, named as in gpu_status.json, or None."""
        return self.source("portable")

    @property
    def sm90(self) -> str | None:
        """CUDA source for GPUs of compute capability 9.0, or None.

        It covers some problem sizes. The portable source computes the others, so it has to be right on these GPUs, too.
        """
        return self.source("sm90")

    def source(self, kernels: str) -> str | None:
        """Return the CUDA source of a kernel set, ``"portable"`` or ``"sm90"``, named as in gpu_status.json."""
        files = self.sources.get({"portable": "cuda", "sm90": "sm90"}[kernels])
        return f"{self.name}/{files[0].removesuffix('.cu')}" if files else None


def _load(path: Path) -> dict[str, Family]:
    families = {}
    for name, entry in json.loads(path.read_text(encoding="utf-8")).items():
        sources = {role: tuple(files) for role, files in entry.pop("sources").items()}
        options = tuple(entry.pop("cpu_options", ()))
        families[name] = Family(name=name, sources=sources, cpu_options=options, **entry)
    return families


FAMILIES = _load(Path(__file__).with_name("families.json"))
"""All families by name."""

GPU_FAMILIES = tuple(family for family in FAMILIES.values() if family.portable is not None)
"""Families with CUDA kernels."""

FAMILY_OF = {family.operator: family.name for family in FAMILIES.values()}
"""Family name of each entry operator."""
