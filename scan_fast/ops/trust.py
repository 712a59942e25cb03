"""Decides which kernels ``impl="auto"`` uses on a GPU.

A kernel that nobody has run on a model of GPU may be wrong there without a sign. So the first of these that has an
answer decides about a family at its first use in a process:

1. SCAN_FAST_SELF_TEST=off trusts everything; SCAN_FAST_GPU_KERNELS=sm90 trusts the kernels for sm_90a if there are any.
2. gpu_status.json: this very source, as built in, has passed the GPU suite on this model.
3. The user's cache: the verdict of an earlier self-test of this build on this model with this driver and PyTorch.
4. The self-test (:mod:`scan_fast.ops.self_test`), whose verdict goes into that cache (:mod:`scan_fast.ops.verdicts`).

If the answer is no, the reference runs, with one warning. On GPUs of compute capability 9.0 both kernel sets of a
family are judged: the portable one must be right, since the other does not cover everything, and the other is used if
it is right too. ``impl="native"`` skips the decision. So do CPUs, on which the test suite runs.

The decision never raises, holds for the life of the process, and costs a dict lookup afterwards. torch.compile treats
it as a constant.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import platform
import re
import threading
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from scan_fast import gpu_status

from . import native, verdicts
from .families import FAMILIES
from .verdicts import Verdict

if TYPE_CHECKING:
    from .self_test import Result

DEVICE_TYPES = frozenset({"cuda"})
"""Device types on which kernels need to be trusted."""

_decided: dict[tuple[str, str, int], bool] = {}
_sm90: dict[str, bool] = {}
_warned: set[tuple[str, str]] = set()
_lock = threading.RLock()


def takes_kernel(family: str, device_type: str, index: int) -> bool:
    """Return whether ``impl="auto"`` uses the kernels of a family on a GPU; test them if nothing is known.

    Args:
        family: a name of :data:`scan_fast.ops.families.FAMILIES`.
        device_type: one of :data:`DEVICE_TYPES`.
        index: of the device.
    """
    decided = _decided.get((family, device_type, index))
    return _decide(family, device_type, index) if decided is None else decided


# As torch.compiler.assume_constant_result does, which would import the compiler: a trace treats the answer as constant.
takes_kernel._dynamo_marked_constant = True  # type: ignore[attr-defined]


def takes_kernel_on(family: str, device: torch.device | str) -> bool:
    """Return :func:`takes_kernel` of a device; True for the CPU. A GPU without a number is the current one."""
    device = torch.device(device)
    if device.type not in DEVICE_TYPES:
        return True
    index = device.index
    if index is None:
        index = torch.cuda.current_device() if device.type == "cuda" and torch.cuda.is_available() else 0
    return takes_kernel(family, device.type, index)


def kernel_sets(family: str, device: torch.device) -> tuple[str, ...]:
    """Return the kernel sets of a family that this build has for a device, ``"portable"`` first."""
    hopper = native.has_sm90(family) and _capability(device) == (9, 0)
    return ("portable", "sm90") if hopper else ("portable",)


def standing(family: str, kernels: str, device: torch.device) -> str:
    """Return in words what is known about a kernel set on a device, without a test."""
    verdict = _known(family, kernels, device)
    return "not tested yet" if verdict is None else verdict.how + (f": {verdict.reason}" if verdict.reason else "")


def _decide(family: str, device_type: str, index: int) -> bool:
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
        except Exception as error:  # plain PyTorch may still work on a broken machine
            answer = False
            _warn(family, "portable", device, Verdict(False, "not possible", _first_line(error)))
        if answer is None:
            return False
        _decided[where] = answer
        return answer


def _judge(family: str, device: torch.device, with_sm90: bool) -> bool | None:
    """Decide about a family; None if that has to wait, and the reference runs until then."""
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
    """Make the family use its kernels for sm_90a if they are right; the portable ones are known to be.

    One switch serves all GPUs of the process. So the test runs before any GPU is decided, and a GPU that refuses them
    later switches them off for all.
    """
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

    If the test itself is not possible, for example without memory, nothing is kept.
    """
    from . import self_test

    key = key_of(family, kernels, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # an error of another kernel shows here, not in the test
    verdicts.keep_running(key)
    try:
        verdict = verdict_of(self_test.run(family, kernels, device))
    except (torch.OutOfMemoryError, MemoryError) as error:
        verdicts.forget(key)
        return Verdict(False, "not possible", _first_line(error))
    except Exception as error:
        verdict = Verdict(False, "self-test failed", _explained(error, device))
    except BaseException:
        verdicts.forget(key)
        raise
    verdicts.keep(key, verdict)
    return verdict


def verdict_of(result: Result) -> Verdict:
    """Return the verdict of a finished self-test."""
    how = "self-test passed" if result.passed else "self-test failed"
    return Verdict(result.passed, how, result.reason, round(result.worst, 4), round(result.milliseconds, 1))


def _explained(error: Exception, device: torch.device) -> str:
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
        remedy = "call it once beforehand" if _capturing(device) else "`scan-fast info --check` tries again"
    elif verdict.how == "crashed":
        what = f"an earlier process crashed or hung while it tested its {kernels} kernels"
        remedy = "`scan-fast info --check` tries again"
    else:
        what = f"its {kernels} kernels failed their self-test ({verdict.reason})"
        remedy = '`scan-fast info --check` tests again, impl="native" runs them all the same'
    warnings.warn(
        f"scan_fast: {family} takes {runs} on {where}, because {what}; {remedy}", RuntimeWarning, stacklevel=2
    )


# ---- what is known -------------------------------------------------------------------------------------------------


def _known(family: str, kernels: str, device: torch.device) -> Verdict | None:
    """Return the verdict of this process, the record or the user's cache; None if there is none."""
    key = key_of(family, kernels, device)
    verdict = verdicts.of_process(key)
    if verdict is not None:
        return verdict
    source = FAMILIES[family].source(kernels)
    if source is not None and gpu_status.passed_on(source, key["source"], key["gpu"]):
        return Verdict(True, "verified")
    return verdicts.of_cache(key)


def key_of(family: str, kernels: str, device: torch.device) -> dict[str, str]:
    """Return the key of a verdict: a change of any of its values requires another test."""
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
    """Return an identifier of the build of the compiled module; architectures and host code count, too."""
    if native._C is None:
        return "none"
    file = os.stat(inspect.getfile(native._C))
    return f"{file.st_size}-{file.st_mtime_ns}"


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return platform.processor() or platform.machine()


def describe(device: torch.device) -> str:
    """Return a device's model and number, or its number alone if the model is unknown."""
    with contextlib.suppress(Exception):
        return f"{_name(device)} ({device})"
    return str(device)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@functools.cache
def _driver() -> str:
    """Return the version of NVIDIA's driver, from its kernel module or its management library."""
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
