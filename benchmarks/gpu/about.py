"""Says what the suite runs on, and whether the module can: ``python -m benchmarks.gpu.about``; one JSON object."""

from __future__ import annotations

import argparse
import json

import torch

from scan_fast.ops import native

from ..environment import describe


def problem(device: str) -> str:
    """Return why the compiled module cannot run here, in one line; "" if it can."""
    if not native.is_available():
        return f"the compiled module cannot be loaded: {native.load_error}"
    if device == "cpu":
        return ""
    if not torch.cuda.is_available():
        return "torch sees no GPU; --rehearse runs the same stages on the CPU"
    info = native.build_info()
    if not info["cuda"]:
        return "the compiled module has no CUDA kernels"
    major, minor = torch.cuda.get_device_capability()
    name, built = torch.cuda.get_device_name(), str(info["cuda_architectures"]).split()
    here = major * 10 + minor
    # Plain machine code runs on later GPUs of the same generation, and the newest comes with PTX for all later ones.
    plain = [int(arch) for arch in built if arch.isdigit()]
    if f"{here}a" not in built and not any(arch <= here for arch in plain):
        return f"the module was built for {' '.join(built)}, and {name} has {major}.{minor}"
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.about", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    found = {"problem": problem(device), "sources": native.build_info().get("sources", {})}
    on_gpu = device == "cuda" and torch.cuda.is_available()
    if on_gpu:
        major, minor = torch.cuda.get_device_capability()
        found["capability"] = f"{major}.{minor}"
        found["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    found["environment"] = describe("cuda" if on_gpu else "cpu")
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
