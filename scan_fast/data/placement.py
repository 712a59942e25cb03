"""Placement of the decoded images of a run: on the host, on the GPU, or not kept at all."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from .. import distributed
from ..errors import DataError
from .sources import Source, SubsetSource

#: Values of ``data.resident``.
Resident = Literal["auto", "host", "device", "files"]

#: Values of ``data.crop``.
Crop = Literal["image", "file", "whole"]

#: Largest shares of the free memory that resident images may take.
HOST_SHARE = 1 / 2
DEVICE_SHARE = 1 / 4


def image_bytes(n: int, size: int) -> int:
    """Return the bytes of n square RGB images."""
    return n * size * size * 3


def kept_on_host(resident: Resident, size_in_bytes: int) -> bool:
    """Return whether encoded images are decoded once and kept; ``auto`` keeps them if they fit in half the free memory.

    Images for the GPU pass through the host. Each of several ranks keeps all images, so those of a machine share its
    memory.
    """
    if resident != "auto":
        return resident in ("host", "device")
    return size_in_bytes <= HOST_SHARE * free_memory() / distributed.current().local_world


def move_to_device(sources: Sequence[Source], resident: Resident, device: torch.device) -> bool:
    """Move resident images to the device of a run if the configuration asks for it; return whether they are there.

    ``auto`` moves them to a GPU if they fit in a quarter of its free memory, divided by the number of ranks that use
    it. With several ranks, all of them must call this, and each decides by its own GPU.

    Raises:
        DataError: for ``device`` if the run's device is not a GPU.
    """
    sharing = _sharing(device)
    if resident == "device" and device.type != "cuda":
        raise DataError(f"data.resident=device needs a CUDA device, this run is on {device}; use auto, host or files")
    owners = {id(owner): owner for owner in map(_owner, sources) if owner.resident}
    if device.type != "cuda" or resident in ("host", "files") or not owners:
        return False
    total = sum(image_bytes(len(owner), owner.size) for owner in owners.values())
    if resident == "auto" and total > DEVICE_SHARE * torch.cuda.mem_get_info(device)[0] / sharing:
        return False
    for owner in owners.values():
        owner.keep_on(device)
    return True


def _sharing(device: torch.device) -> int:
    """Return how many ranks use this GPU."""
    if not distributed.several():
        return 1
    name = None
    if device.type == "cuda":
        name = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    return distributed.gathered(name).count(name)


def _owner(source: Source) -> Source:
    while isinstance(source, SubsetSource):
        source = source.source
    return source


def free_memory() -> int:
    """Return the bytes of host memory that this process may still allocate, limited by machine and control group."""
    free = _machine_memory()
    for limit, used, cache in _CONTROL_GROUP_FILES:
        try:
            most, now = int(Path(limit).read_text()), int(Path(used).read_text())
            fields = dict(line.split() for line in Path(cache).read_text().splitlines())
        except (OSError, ValueError):  # no control groups, or "max"
            continue
        # The kernel frees cached pages of files on demand.
        free = min(free, max(0, most - now + int(fields.get("inactive_file", 0))))
    return free


_CONTROL_GROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _machine_memory() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:  # macOS reports only the total
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 8 << 30
