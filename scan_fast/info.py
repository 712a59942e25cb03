"""What was built, and what each operation will run on: the facts behind ``scan-fast info``."""

from __future__ import annotations

import importlib.util
import platform
from typing import Any

import torch

from . import __version__, gpu_status
from .ops import convolution, native, trust
from .ops.families import GPU_FAMILIES

OPERATIONS = {
    "nt_xent": "nt_xent_forward",
    "scan_loss": "scan_loss_forward",
    "self_label_loss": "self_label_forward",
    "topk_neighbors": "topk_neighbors",
}
LAYERS = {
    "batch_norm": lambda device: native.has_kernel("batch_norm_forward", device),
    "conv2d, bfloat16": convolution.is_usable,
}
"""What networks take for their layers; the reference is PyTorch's own operator."""
OPTIONAL_PACKAGES = {
    "nvidia.dali": "data.renderer=dali",
    "faiss": "mining.backend=faiss",
    "timm": "model.backbone=timm:NAME",
    "tensorboard": "runtime.tensorboard=true",
}


def collect() -> dict[str, Any]:
    """Return the facts as plain values."""
    return {
        "scan_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "build": native.build_info(),
        "operations": {
            name: {device: runs_on(operator, device) for device in ("cpu", "cuda")}
            for name, operator in OPERATIONS.items()
        }
        | {
            name: {device: "native" if taken(device) else "reference" for device in ("cpu", "cuda")}
            for name, taken in LAYERS.items()
        },
        "gpu_kernels": gpu_status.records(),
        "gpu_trust": _gpu_trust(),
        "renderer": {
            device: "fused" if native.has_kernel("augment", device) else "torch" for device in ("cpu", "cuda")
        },
        "optional_packages": {name: _installed(name) for name in OPTIONAL_PACKAGES},
    }


def _gpu_trust() -> dict[str, dict[str, str]]:
    """Return what is known about each family's kernel sets on this GPU; empty without GPU or CUDA kernels."""
    if not (torch.cuda.is_available() and native.has_kernel("nt_xent_forward", "cuda")):
        return {}
    device = torch.device("cuda", torch.cuda.current_device())
    return {
        family.name: {
            kernels: trust.standing(family.name, kernels, device) for kernels in trust.kernel_sets(family.name, device)
        }
        for family in GPU_FAMILIES
    }


def runs_on(operator: str, device: str) -> str:
    """Return "native" or "reference": what impl="auto" takes for float32 on a device, on a GPU if it is trusted."""
    return "native" if native.has_kernel(operator, device) else "reference"


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
    lines.append("operations (impl=auto, float32; on a GPU where its kernels are trusted, see below):")
    lines += [f"  {name:<16} cpu: {on['cpu']:<10} cuda: {on['cuda']}" for name, on in facts["operations"].items()]
    renderer = facts["renderer"]
    lines.append(
        f"  {'views':<16} cpu: {renderer['cpu']:<10} cuda: {renderer['cuda']}"
        "  (data.renderer=auto: fused where its kernel is compiled and trusted, else torch)"
    )
    lines.append("CUDA kernels:")
    lines += [f"  {gpu_status.summary(name, record)}" for name, record in facts["gpu_kernels"].items()]
    if facts["gpu_trust"]:
        lines.append("on this GPU (a first use tests what was not; --check tests all now):")
    for name, sets in facts["gpu_trust"].items():
        lines += [f"  {name:<12} {kernels:<9} {standing}" for kernels, standing in sets.items()]
    lines.append("optional packages:")
    lines += [
        f"  {name:<16} {'installed' if facts['optional_packages'][name] else 'missing'} ({use})"
        for name, use in OPTIONAL_PACKAGES.items()
    ]
    return "\n".join(lines)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
