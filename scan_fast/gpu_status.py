"""Read the record of the CUDA kernels that have passed on a GPU.

gpu_status.json has one entry per CUDA source. Its ``"status"`` is one of:

- ``"verified"``: this version of the source passed.
- ``"unverified"``: an earlier version passed; its record stays under ``"passed"``.
- ``"failed"`` or ``"partly run"``: this version ran; ``"latest"`` has the reason.
- ``"never run"``.

``python -m tools.gpu.status`` maintains the file. ``scan-fast info`` and docs/gpu-status.md show it. A kernel that was
verified on a model of GPU is used there without a self-test (``ops/trust.py``).
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).with_name("gpu_status.json")
_HOST_ONLY = "testing/"
"""Folder of the emulator: device.h and hopper.cuh include its headers for runs on the host only."""
_COMMENT_OR_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)


def records() -> dict[str, dict[str, Any]]:
    """Return the entry of each kernel, by its source without suffix below csrc/, e.g. ``"nt_xent/nt_xent_cuda"``."""
    kernels: dict[str, dict[str, Any]] = json.loads(RECORDS.read_text())["kernels"]
    return kernels


def passed_on(kernel: str, digest: str, gpu: str) -> bool:
    """Return whether a source of this hash has passed on this model of GPU."""
    try:
        record = records().get(kernel, {})
    except (OSError, ValueError, LookupError):
        return False
    passed = record.get("passed") or {}
    return record.get("status") == "verified" and passed.get("sha256") == digest and passed.get("device") == gpu


def summary(name: str, record: dict[str, Any]) -> str:
    """Return one line about a kernel."""
    if record["status"] == "never run":
        return f"{name}: compiled, never run on a GPU"
    latest = record.get("latest")
    if latest is not None:
        where = f"on {latest['device']}, {latest['date']}, commit {latest['commit'][:12]}"
        return f"{name}: {record['status']} {where}: {latest['reason']}"
    passed = record["passed"]
    where = f"on {passed['device']}, {passed['date']}, commit {passed['commit'][:12]}"
    if record["status"] == "verified":
        return f"{name}: passed {where}"
    return f"{name}: changed since it passed {where}"


def kernels_of(csrc: Path) -> dict[str, Path]:
    """Return the CUDA sources of the module below ``csrc`` by name, without those of the C++ tests."""
    sources = sorted(path for path in csrc.rglob("*.cu") if "tests" not in path.relative_to(csrc).parts)
    return {str(path.relative_to(csrc).with_suffix("")): path for path in sources}


def source_hash(csrc: Path, source: Path) -> str:
    """Return the SHA-256 of a CUDA source and of all headers of the project that it includes.

    Comments and white space are left out, because they cannot change what runs.
    """
    digest = hashlib.sha256()
    seen: list[Path] = []
    waiting = [source]
    while waiting:
        path = waiting.pop(0)
        if path in seen:
            continue
        seen.append(path)
        text = path.read_text()
        included = re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)
        waiting += [csrc / name for name in included if (csrc / name).is_file() and not name.startswith(_HOST_ONLY)]
        code = _COMMENT_OR_STRING.sub(lambda match: match[0] if match[0].startswith('"') else " ", text)
        digest.update(f"{path.relative_to(csrc)}\n{' '.join(code.split())}\n".encode())
    return digest.hexdigest()
