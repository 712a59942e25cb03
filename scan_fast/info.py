"""Collect and render the facts of ``scan-fast info``: the build, and the implementation of each operation."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict
from typing import Any

import torch

from . import __version__, gpu_status
from .data.formats import FORMATS, missing_formats
from .models.published import PUBLISHED, table
from .ops import native, trust
from .ops.families import FAMILIES, GPU_FAMILIES, Family

OPTIONAL_PACKAGES = {
    "nvidia.dali": "data.renderer=dali",
    "faiss": "mining.backend=faiss",
    "timm": "model.backbone=timm:NAME",
    "tensorboard": "runtime.tensorboard=true",
}
"""Optional packages, and the setting that needs each."""


def collect() -> dict[str, Any]:
    """Return the facts as plain values. An image format has what to install, or None if it can be read."""
    missing = missing_formats()
    return {
        "scan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "build": native.build_info(),
        "operations": {
            family.function: {device: runs_on(family, device) for device in ("cpu", "cuda")}
            for family in FAMILIES.values()
        },
        "gpu_kernels": gpu_status.records(),
        "gpu_trust": _gpu_trust(),
        "pretrained_backbones": {name: asdict(entry) for name, entry in PUBLISHED.items()},
        "optional_packages": {name: _installed(name) for name in OPTIONAL_PACKAGES},
        "image_formats": {format.name: missing.get(format.name) for format in FORMATS},
    }


def _gpu_trust() -> dict[str, dict[str, str]]:
    """Return what is known about each family's kernel sets on this GPU; empty without GPU or CUDA kernels."""
    if not (torch.cuda.is_available() and native.build_info().get("cuda")):
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        family.name: {
            kernels: trust.standing(family.name, kernels, device) for kernels in trust.kernel_sets(family.name, device)
        }
        for family in GPU_FAMILIES
    }


def runs_on(family: Family, device: str) -> str:
    """Return what ``impl="auto"`` runs for float32 on a device type, ``"native"`` or ``"reference"``.

    On a GPU the kernels run if they are trusted there.
    """
    usable = native.has_kernel(family.operator, device)
    if device == "cpu" and family.cpu_requires is not None:
        usable = usable and bool(native.build_info()[family.cpu_requires])
    return "native" if usable else "reference"


def render(facts: dict[str, Any]) -> str:
    """Return the facts as text for the terminal."""
    build = facts["build"]
    lines = [
        f"scan-fast {facts['scan_fast']}, Python {facts['python']}, torch {facts['torch']}, {facts['threads']} threads",
        f"GPU: {facts['cuda_device'] or 'none usable'}",
    ]
    if "error" in build:
        lines.append(f"compiled kernels: none ({build['error']})")
    else:
        cuda = f"CUDA {build['cuda']} for {build['cuda_architectures']}" if build["cuda"] else "CPU only"
        lines.append(f"compiled kernels: {cuda}, against torch {build['torch']}")
        lines += [
            f"  {key}: {value}"
            for key, value in build.items()
            if key not in ("cuda", "cuda_architectures", "torch", "sources")
        ]
    lines.append("operations (on a GPU the native kernels run if they are trusted, see below):")
    lines += [f"  {name:<16} cpu: {on['cpu']:<10} cuda: {on['cuda']}" for name, on in facts["operations"].items()]
    lines.append("CUDA kernels:")
    lines += [f"  {gpu_status.summary(name, record)}" for name, record in facts["gpu_kernels"].items()]
    if facts["gpu_trust"]:
        lines.append("on this GPU (the first use tests what was not tested; --check tests all now):")
    for name, sets in facts["gpu_trust"].items():
        lines += [f"  {name:<12} {kernels:<9} {standing}" for kernels, standing in sets.items()]
    lines.append("pretrained backbones (model.backbone=NAME, see docs/pretrained.md):")
    lines += [f"  {line}" for line in table()]
    lines.append("optional packages:")
    lines += [
        f"  {name:<16} {'installed' if facts['optional_packages'][name] else 'missing'} ({use})"
        for name, use in OPTIONAL_PACKAGES.items()
    ]
    formats = facts["image_formats"]
    lines.append(f"image formats: {', '.join(name for name, remedy in formats.items() if remedy is None)}")
    lines += [f"  {name:<16} missing ({remedy})" for name, remedy in formats.items() if remedy is not None]
    return "\n".join(lines)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
