"""Verdicts of self-tests: those of this process, and the user's cache with one small file per key.

A key (:func:`scan_fast.ops.trust.key_of`) says what was tested: kernels, source, build, GPU, driver and PyTorch. A
cache that cannot be read or written counts as empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..atomic import atomic_file

Key = dict[str, str]

STALE_SECONDS = 120.0
"""A self-test takes less than a second: one that began longer ago and has no verdict crashed or hangs."""

_KINDS = ("passed", "failed", "running")
_of_process: dict[str, Verdict] = {}


@dataclass(frozen=True)
class Verdict:
    """Knowledge about a kernel set on a GPU.

    Attributes:
        passed: whether it may be used.
        how: ``"verified"``, ``"self-test passed"``, ``"self-test failed"``, ``"crashed"`` or ``"not possible"``.
        reason: why not, in words; empty if it passed.
        worst: the largest error of the self-test as a share of what is allowed; None without a self-test.
        milliseconds: duration of the self-test.
    """

    passed: bool
    how: str
    reason: str = ""
    worst: float | None = None
    milliseconds: float | None = None


def of_process(key: Key) -> Verdict | None:
    """Return the verdict that this process has made or read; None if there is none."""
    return _of_process.get(json.dumps(key))


def of_cache(key: Key) -> Verdict | None:
    """Return the verdict of an earlier process; None if there is none, or if a test is running now."""
    entry = _read(key)
    if entry is None:
        return None
    if entry["verdict"] == "running":
        return None if _is_alive(entry) else Verdict(False, "crashed", "an earlier process crashed or hung in it")
    verdict = Verdict(**entry["details"])
    _of_process[json.dumps(key)] = verdict
    return verdict


def keep(key: Key, verdict: Verdict) -> None:
    """Keep a verdict for this process and later ones."""
    _of_process[json.dumps(key)] = verdict
    _write({"key": key, "verdict": "passed" if verdict.passed else "failed", "details": asdict(verdict)})


def keep_running(key: Key) -> None:
    """Record that this process is about to test, so that a later one knows of a crash."""
    pid = os.getpid()
    _write(
        {"key": key, "verdict": "running", "pid": pid, "started": _started(pid), "host": _host(), "time": time.time()}
    )


def forget(key: Key) -> None:
    """Remove a key from the cache."""
    with contextlib.suppress(OSError, RuntimeError):
        path_of(key).unlink()


def cache_folder() -> Path:
    """Return the folder of the cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scan-fast" / "gpu-verdicts"


def path_of(key: Key) -> Path:
    """Return the file of a key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{key['family']}-{key['kernels']}-{digest[:24]}.json"


def _write(entry: dict[str, Any]) -> None:
    """Replace an entry in one step."""
    # A cache that cannot be written costs another self-test; RuntimeError means that there is no home folder.
    with contextlib.suppress(OSError, RuntimeError), atomic_file(path_of(entry["key"])) as file:
        file.write(json.dumps(entry).encode())


def _read(key: Key) -> dict[str, Any] | None:
    """Return the entry of a key; None if there is none, or if it is damaged."""
    try:
        entry = json.loads(path_of(key).read_text(encoding="utf-8"))
        if entry["key"] != key or entry["verdict"] not in _KINDS:
            return None
        if entry["verdict"] == "running":
            float(entry["time"])
        elif Verdict(**entry["details"]).passed is not (entry["verdict"] == "passed"):
            return None
        return dict(entry)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _is_alive(entry: dict[str, Any]) -> bool:
    """Return whether the process that wrote a "running" entry is still testing.

    If that process cannot be seen, on another machine or in another container, it is assumed alive for a while.
    """
    if not -STALE_SECONDS < time.time() - float(entry["time"]) < STALE_SECONDS:
        return False
    if entry.get("host") != _host():
        return True
    started = _started(entry.get("pid"))
    return started is not None and started == entry.get("started")


def _host() -> str | None:
    """Return an identifier of this boot of this machine, or of this container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: object) -> str | None:
    """Return when a process began, in clock ticks of the system; None if it has ended or cannot be seen."""
    try:
        # Fields from the third on: the second is a name in parentheses that may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None
