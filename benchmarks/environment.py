"""Description of the machine and the code that a result belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from scan_fast import __version__
from scan_fast.devices import processor_name
from scan_fast.ops import native

CPU_CLASSES = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2", "baseline": "the baseline of its architecture"}
"""Classes of CPU by the best instructions that the kernels use there, with the words for them; the best class first."""


def cpu_class(build: Mapping[str, Any]) -> str:
    """Return the key of CPU_CLASSES for what :func:`scan_fast.ops.native.build_info` says.

    ``SCAN_FAST_CPU_ISA`` lowers the class together with the kernels, but not the instructions that PyTorch uses.
    """
    return "amx" if build.get("cpu_amx_bf16") else str(build.get("cpu_isa", "baseline"))


def kind_of(device: str, build: Mapping[str, Any]) -> str:
    """Return what targets belong to: ``"cuda"``, or ``"cpu-"`` with the class, such as ``"cpu-avx2"``."""
    return device if device != "cpu" else f"cpu-{cpu_class(build)}"


def result_file(kind: str, name: str) -> str:
    """Return the name of the file with a result of a benchmark: ``cpu-targets.json`` or ``cpu-targets-avx2.json``.

    The committed results are of processors with AMX; those of another class stand beside them.
    """
    device, _, of_class = kind.partition("-")
    return f"{device}-{name}{'' if of_class in ('', 'amx') else '-' + of_class}.json"


def describe(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit as plain values."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else processor_name(),
        "threads": torch.get_num_threads(),
        "scan_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": native.build_info(),
        "commit": _commit(),
    }


def _commit() -> str:
    """Return SCAN_FAST_COMMIT (for a tree without its .git folder), else the commit of git, else "unknown"."""
    given = os.environ.get("SCAN_FAST_COMMIT", "").strip()
    if given:
        return given
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + (" with changes" if changed.strip() else "")
