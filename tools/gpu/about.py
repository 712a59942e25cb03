"""Prints one JSON object about this machine and the compiled module: ``python -m tools.gpu.about``."""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch

from benchmarks.environment import describe
from scan_fast.ops import native


def problem(device: str) -> tuple[str, bool]:
    """Return in one line why the compiled module cannot run here ("" if it can), and whether building would help."""
    if device == "cuda" and not torch.cuda.is_available():
        return "torch sees no GPU; --rehearse runs the same stages on the CPU", False
    if not native.is_available():
        return f"the compiled module cannot be loaded: {native.load_error}", True
    if device == "cpu":
        return "", False
    info = native.build_info()
    if not info["cuda"]:
        return "the compiled module has no CUDA kernels", True
    major, minor = torch.cuda.get_device_capability()
    if not runs_on(major, minor, str(info["cuda_architectures"]).split()):
        name = torch.cuda.get_device_name()
        return f"the module was built for {info['cuda_architectures']}, and {name} has {major}.{minor}", True
    return "", False


def runs_on(major: int, minor: int, built: list[str]) -> bool:
    """Return whether kernels built for some architectures, such as "80 90a 100", run on a compute capability.

    Plain machine code runs on GPUs of the same major version and no smaller minor one, "90a" on 9.0 alone; the build
    adds PTX, which runs on all later ones, of the newest plain one (CMakeLists.txt).
    """
    here = 10 * major + minor
    plain = [int(arch) for arch in built if arch.isdigit()]
    same = any(arch // 10 == major and arch <= here for arch in plain)
    return f"{here}a" in built or same or max(plain, default=here + 1) <= here


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.about", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    what, build_helps = problem(device)
    info = native.build_info()
    found: dict[str, Any] = {"problem": what, "build_helps": build_helps, "sources": info.get("sources", {})}
    found["wait_limit"] = bool(info.get("wait_limit"))
    on_gpu = device == "cuda" and torch.cuda.is_available()
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        found["capability"] = f"{major}.{minor}"
        found["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    found["environment"] = describe("cuda" if on_gpu else "cpu")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
