"""Which kernels ``impl="auto"`` trusts on a GPU.

A kernel that nobody has run on a model of GPU may be wrong there without a sign. So the first use of a family in a
process, on a GPU, is decided by the first of these that has an answer:

1. SCAN_FAST_SELF_TEST=off trusts everything; SCAN_FAST_GPU_KERNELS=sm90 trusts the kernels for sm_90a where they are.
2. gpu_status.json: this very source, as built in, has passed the GPU suite on this model.
3. The user's cache: the verdict of an earlier self-test of this build on this model with this driver and PyTorch.
4. The self-test (:mod:`scan_fast.ops.self_test`), whose verdict goes into that cache.

Where the answer is no, the reference runs, with one warning. On GPUs of compute capability 9.0 both kernel sets of a
family are judged: the portable one must be right, since the other does not cover everything, and the other is taken if
it is right too. ``impl="native"`` asks nobody. Processors are not asked about either: the test suite runs on them.

The decision never raises, holds for the life of the process, and costs a look into a dict from then on. torch.compile
takes it as a constant.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import socket
import tempfile
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scan_fast import gpu_status

from .families import FAMILIES

if TYPE_CHECKING:
    from .self_test import Result

DEVICE_TYPES = frozenset({"cuda"})
"""The device types on which kernels need to be trusted."""

_STALE_SECONDS = 120.0
"""A self-test takes less than a second: one that began longer ago and has no verdict crashed or hangs."""

_KINDS = ("passed", "failed", "running")


@dataclass(frozen=True)
class Verdict:
    """What is known about a kernel set on a GPU.

    Attributes:
        passed: whether it may be used.
        how: ``"verified"``, ``"self-test passed"``, ``"self-test failed"``, ``"crashed"`` or ``"not possible"``.
        reason: why not, in words; empty if it passed.
        worst: the largest error of the self-test as a share of what is allowed; None without a self-test.
        milliseconds: of the self-test.
    """

    passed: bool
    how: str
    reason: str = ""
    worst: float | None = None
    milliseconds: float | None = None


_decided: dict[tuple[str, str, int], bool] = {}
_known_here: dict[str, Verdict] = {}
_sm90: dict[str, bool] = {}
_warned: set[tuple[str, str]] = set()
_lock = threading.RLock()


def takes_kernel(family: str, device_type: str, index: int) -> bool:
    """Return whether ``impl="auto"`` takes the kernels of a family on a GPU; test them if nothing is known.

    Args:
        family: a name of :data:`scan_fast.ops.families.FAMILIES`.
        device_type: one of :data:`DEVICE_TYPES`.
        index: of the device.
    """
    decided = _decided.get((family, device_type, index))
    return _decide(family, device_type, index) if decided is None else decided


# As torch.compiler.assume_constant_result does, which would import the compiler: a trace takes the answer as it is.
takes_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_kernel_on(family: str, device: torch.device | str) -> bool:
    """Return what :func:`takes_kernel` does, True for the CPU; a GPU without a number is the current one."""
    device = torch.device(device)
    if device.type not in DEVICE_TYPES:
        return True
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0
    return takes_kernel(family, device.type, index)


def kernel_sets(family: str, device: torch.device) -> tuple[str, ...]:
    """Return the kernel sets of a family that this build has for a device, ``"portable"`` first."""
    from . import native

    hopper = native.has_sm90(family) and _capability(device) == (9, 0)
    return ("portable", "sm90") if hopper else ("portable",)


def standing(family: str, kernels: str, device: torch.device) -> str:
    """Return what is known about a kernel set on a device, in words; nothing is tested."""
    verdict = _known(family, kernels, device)
    return "not tested yet" if verdict is None else verdict.how + (f": {verdict.reason}" if verdict.reason else "")


def _decide(family: str, device_type: str, index: int) -> bool:
    from . import native  # which imports this module

    where = (family, device_type, index)
    with _lock:
        if where in _decided:
            return _decided[where]
        device = torch.device(device_type, index)
        try:
            if os.environ.get("SCAN_FAST_SELF_TEST") == "off":
                answer: bool | None = True
                if native.KERNEL_CHOICE == "auto" and "sm90" in kernel_sets(family, device):
                    native.take_sm90(family, True)
            elif native.KERNEL_CHOICE == "sm90" and "sm90" in kernel_sets(family, device):
                answer = True
            else:
                answer = _judge(family, device, native.KERNEL_CHOICE == "auto")
        except Exception as error:  # whatever is wrong with a machine, plain PyTorch may still work there
            answer = False
            _warn(family, "portable", device, Verdict(False, "not possible", _first_line(error)))
        if answer is None:
            return False
        _decided[where] = answer
        return answer


def _judge(family: str, device: torch.device, with_sm90: bool) -> bool | None:
    """Decide about a family; None where that has to wait, and the reference runs until then."""
    portable = _known(family, "portable", device)
    if portable is None:
        if _capturing(device):
            _warn(family, "portable", device, Verdict(False, "not possible", "nothing can be tested in a CUDA graph"))
            return None
        portable = run_test(family, "portable", device)
    if not portable.passed:
        _warn(family, "portable", device, portable)
        return False
    if with_sm90 and "sm90" in kernel_sets(family, device):
        _judge_sm90(family, device)
    return True


def _judge_sm90(family: str, device: torch.device) -> None:
    """Have the family take its kernels for sm_90a if they are right; the portable ones are known to be.

    The switch is one for all GPUs of the process. So the test runs before any GPU has been decided upon, and one that
    refuses them later switches them off for all.
    """
    from . import native

    verdict = _known(family, "sm90", device)
    if verdict is None and family not in _sm90:
        if _capturing(device):
            return
        verdict = run_test(family, "sm90", device)
    passed = verdict is not None and verdict.passed
    _sm90[family] = passed and _sm90.get(family, True)
    native.take_sm90(family, _sm90[family])
    if verdict is not None and not passed:
        _warn(family, "sm90", device, verdict)


def run_test(family: str, kernels: str, device: torch.device) -> Verdict:
    """Run a self-test now, whatever is known, and keep the verdict for later processes.

    Where the test itself was not possible, as without memory, nothing is kept.
    """
    from . import self_test

    key = key_of(family, kernels, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # an error of somebody else's kernel shows here, and is not this family's
    keep_running(key)
    try:
        verdict = verdict_of(self_test.run(family, kernels, device))
    except (torch.OutOfMemoryError, MemoryError) as error:
        _forget(key)
        return Verdict(False, "not possible", _first_line(error))
    except Exception as error:
        verdict = Verdict(False, "self-test failed", _explained(error, device))
    except BaseException:
        _forget(key)
        raise
    keep(key, verdict)
    return verdict


def verdict_of(result: Result) -> Verdict:
    """Return the verdict of a self-test that came to an end."""
    how = "self-test passed" if result.passed else "self-test failed"
    return Verdict(result.passed, how, result.reason, round(result.worst, 4), round(result.milliseconds, 1))


def _explained(error: Exception, device: torch.device) -> str:
    from . import native

    text = _first_line(error)
    if "no kernel image" in text:
        major, minor = _capability(device)
        built = native.build_info().get("cuda_architectures")
        return f"this build has kernels for {built}, the GPU is {major}{minor}: build on this machine"
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return f"{text}; start the program again, this process has lost its GPU"
    return text


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__


def _warn(family: str, kernels: str, device: torch.device, verdict: Verdict) -> None:
    if (family, kernels) in _warned:
        return
    _warned.add((family, kernels))
    runs = "plain PyTorch" if kernels == "portable" else "its portable kernels"
    where = describe(device)
    if verdict.how == "not possible":
        what = f"its {kernels} kernels could not be tested ({verdict.reason})"
        mend = "call it once beforehand" if _capturing(device) else "`scan-fast info --check` tries again"
    elif verdict.how == "crashed":
        what = f"an earlier process crashed or hung while it tested its {kernels} kernels"
        mend = "`scan-fast info --check` tries again"
    else:
        what = f"its {kernels} kernels failed their self-test ({verdict.reason})"
        mend = '`scan-fast info --check` tests again, impl="native" runs them all the same'
    warnings.warn(f"scan_fast: {family} takes {runs} on {where}, because {what}; {mend}", RuntimeWarning, stacklevel=2)


# ---- what is known -------------------------------------------------------------------------------------------------


def _known(family: str, kernels: str, device: torch.device) -> Verdict | None:
    """Return what the record, this process or the user's cache says; None if nothing."""
    key = key_of(family, kernels, device)
    name = json.dumps(key)
    if name in _known_here:
        return _known_here[name]
    source = FAMILIES[family].source(kernels)
    if source is not None and gpu_status.passed_on(source, key["source"], key["gpu"]):
        return Verdict(True, "verified")
    entry = _read(key)
    if entry is None:
        return None
    if entry["verdict"] == "running":
        return None if _is_alive(entry) else Verdict(False, "crashed", "an earlier process crashed or hung in it")
    verdict = Verdict(**entry["details"])
    _known_here[name] = verdict
    return verdict


def key_of(family: str, kernels: str, device: torch.device) -> dict[str, str]:
    """Return what a verdict is about: another value of any of these asks for another test."""
    from . import native

    source = FAMILIES[family].source(kernels)
    return {
        "family": family,
        "kernels": kernels,
        "source": native.build_info().get("sources", {}).get(source, "unknown"),
        "module": _module(),
        "gpu": _name(device),
        "driver": _driver() if device.type == "cuda" else "none",
        "torch": torch.__version__,
    }


@functools.cache
def _module() -> str:
    """Return what tells one build of the compiled module from another: its architectures and host code count, too."""
    from . import native

    if native._C is None:
        return "none"
    file = os.stat(native._C.__file__)
    return f"{file.st_size}-{file.st_mtime_ns}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> str:
    """Return a device's model and number, or its number alone where it cannot be asked."""
    with contextlib.suppress(Exception):
        return f"{_name(device)} ({device})"
    return str(device)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _driver() -> str:
    """Return the version of NVIDIA's driver: what the kernel module says, else what its management library says."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", Path("/proc/driver/nvidia/version").read_text())
        if found:
            return found[1]
    import ctypes

    try:
        nvml = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1")
        text = ctypes.create_string_buffer(96)
        if nvml.nvmlInit_v2() == 0:
            failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
            nvml.nvmlShutdown()
            if failed == 0:
                return text.value.decode()
    except (OSError, AttributeError, UnicodeDecodeError):
        pass
    return "unknown"


# ---- the user's cache: one small file per key -----------------------------------------------------------------------


def cache_folder() -> Path:
    """Return where verdicts are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scan-fast" / "gpu-verdicts"


def keep(key: dict[str, str], verdict: Verdict) -> None:
    """Keep a verdict for this process and later ones; a cache that cannot be written is none."""
    _known_here[json.dumps(key)] = verdict
    _write({"key": key, "verdict": "passed" if verdict.passed else "failed", "details": asdict(verdict)})


def keep_running(key: dict[str, str]) -> None:
    """Write down that this process is about to test, so that a crash is known next time."""
    pid = os.getpid()
    _write(
        {"key": key, "verdict": "running", "pid": pid, "started": _started(pid), "host": _host(), "time": time.time()}
    )


def _path(key: dict[str, str]) -> Path:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder() / f"{key['family']}-{key['kernels']}-{digest[:24]}.json"


def _forget(key: dict[str, str]) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        _path(key).unlink()


def _write(entry: dict[str, Any]) -> None:
    """Put an entry in the place of what is there, in one step."""
    temporary = None
    try:
        path = _path(entry["key"])
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        os.replace(temporary, path)
    except (OSError, RuntimeError):  # the latter where there is no home
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _read(key: dict[str, str]) -> dict[str, Any] | None:
    """Return the entry of a key; None where there is none that makes sense."""
    try:
        entry = json.loads(_path(key).read_text(encoding="utf-8"))
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
    """Return whether the process that wrote a "running" entry still works on it.

    Where that process cannot be seen, on another machine or in another container, it is believed for a while.
    """
    if not -_STALE_SECONDS < time.time() - float(entry["time"]) < _STALE_SECONDS:
        return False
    if entry.get("host") != _host():
        return True
    started = _started(entry.get("pid"))
    return started is not None and started == entry.get("started")


def _host() -> str | None:
    """Return what tells this run of this machine, or this container, from others."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: object) -> str | None:
    """Return when a process began, in the system's own measure; None if it has ended or cannot be seen."""
    try:
        # Fields from the third on: the second is a name in parentheses that may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        return None
