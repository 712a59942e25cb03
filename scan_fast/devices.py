"""Choice of the device by name, and the name of the processor."""

from __future__ import annotations

import functools
import platform
from pathlib import Path

import torch

from . import distributed
from .errors import ConfigError


def choose_device(name: str, option: str = "runtime.device") -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:1`` into a device; ``auto`` is a GPU if there is one.

    With several processes on a machine, each has a GPU of its machine: process N of a machine takes GPU N.

    Args:
        name: the device.
        option: the setting or option that holds it, for the message.

    Raises:
        ConfigError: for another name, or a device that this machine does not have.
    """
    if distributed.several() and name in ("auto", "cuda") and torch.cuda.is_available():
        place = distributed.current()
        if place.local_world > torch.cuda.device_count():
            raise ConfigError(
                f"{place.local_world} processes on this machine need as many GPUs, and it has "
                f"{torch.cuda.device_count()} usable ones: start torchrun with --nproc-per-node "
                f"{torch.cuda.device_count()}, or set {option}=cpu"
            )
        return torch.device("cuda", place.local_rank)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{option} must be auto, cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"{option}={name}: this machine has {torch.cuda.device_count()} usable CUDA devices")
    if device.type == "cuda" and device.index is not None and distributed.several():
        raise ConfigError(f"{option}={name} would give all processes one GPU; {option}=cuda gives each its own")
    return device


@functools.cache
def processor_name() -> str:
    """Return the name of the processor, or of its architecture if the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
