"""Description of the machine and the code that a result belongs to."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from scan_fast import __version__
from scan_fast.ops import native


def describe(device: str) -> dict[str, Any]:
    """Return hardware, versions and commit as plain values."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "scan_fast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "build": native.build_info(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


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
