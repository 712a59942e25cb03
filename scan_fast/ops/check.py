"""Run all self-tests, each in a separate process, for ``scan-fast info --check``.

``python -m scan_fast.ops.check FAMILY KERNELS DEVICE`` is such a process. It prints its verdict as one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch

from ..errors import UsageError
from . import native, self_test, trust, verdicts
from .families import GPU_FAMILIES
from .verdicts import Verdict

LIMIT_SECONDS = 60.0
"""Time limit of a process. Importing PyTorch takes most of it."""

Row = tuple[str, str, Verdict]
"""Family, kernel set, verdict."""


def device_of(text: str) -> torch.device:
    """Return the device to check.

    Raises:
        UsageError: if there is nothing to check on it.
    """
    try:
        device = torch.device(text)
    except RuntimeError:
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {text!r}") from None
    if not native.is_available():
        raise UsageError(f"there are no compiled kernels to check: {native.load_error}")
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise UsageError(f"--device must be cpu, cuda or cuda:N, got {text!r}")
    if not torch.cuda.is_available():
        raise UsageError("no GPU is usable here, so there is nothing to check (--device cpu tests the CPU kernels)")
    if not native.has_kernel("nt_xent_forward", "cuda"):
        raise UsageError("this build has no CUDA kernels (--device cpu tests the CPU kernels)")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UsageError(f"there is no {device}: {torch.cuda.device_count()} GPUs are usable here")
    return torch.device("cuda", index)


def check(
    device: torch.device,
    limit: float = LIMIT_SECONDS,
    command: Callable[[str, str], Sequence[str]] | None = None,
) -> Iterator[Row]:
    """Test every family and kernel set again. Verdicts on GPUs are stored in the user's cache.

    Args:
        device: "cpu" or a GPU with its number.
        limit: seconds per test. A test that crashes or hangs has failed, and the next one runs.
        command: returns the command line of a test process for a family and a kernel set.
    """
    for family in GPU_FAMILIES:
        for kernels in trust.kernel_sets(family.name, device):
            words = (command or _command(device))(family.name, kernels)
            yield family.name, kernels, _verdict_of(words, family.name, kernels, device, limit)


def _command(device: torch.device) -> Callable[[str, str], Sequence[str]]:
    return lambda family, kernels: [sys.executable, "-m", "scan_fast.ops.check", family, kernels, str(device)]


def _verdict_of(words: Sequence[str], family: str, kernels: str, device: torch.device, limit: float) -> Verdict:
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        output, errors = process.communicate(timeout=limit)
        code = process.returncode
        if code == 0:
            # The last line, because libraries may print before it.
            return Verdict(**json.loads(output.splitlines()[-1]))
        last = (errors.strip().splitlines() or ["nothing on standard error"])[-1]
        reason = f"its process ended with signal {-code}" if code < 0 else f"its process ended with {code}: {last}"
    except subprocess.TimeoutExpired:
        reason = f"no result after {limit:.0f} s"
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # the GPU driver may delay its end
            process.communicate(timeout=5)
    except (ValueError, LookupError, TypeError):
        reason = "its process printed no verdict"
    verdict = Verdict(False, "crashed", reason)
    if device.type in trust.DEVICE_TYPES:
        verdicts.keep(trust.key_of(family, kernels, device), verdict)
    return verdict


def table(rows: Sequence[Row], device: torch.device) -> str:
    """Format the verdicts as a table for the terminal."""
    lines = [
        f"self-tests on {trust.describe(device)}:",
        f"  {'family':<12} {'kernels':<9} {'verdict':<8} {'ms':>8}  {'error/allowed':>13}",
    ]
    for family, kernels, verdict in rows:
        shown = "cpu" if device.type == "cpu" else kernels
        time = "" if verdict.milliseconds is None else f"{verdict.milliseconds:.1f}"
        worst = "" if verdict.worst is None else f"{verdict.worst:.2f}"
        word = "passed" if verdict.passed else "crashed" if verdict.how == "crashed" else "failed"
        line = f"  {family:<12} {shown:<9} {word:<8} {time:>8}  {worst:>13}"
        lines.append(line + (f"  {verdict.reason}" if verdict.reason else ""))
    return "\n".join(lines)


def main() -> None:
    """Test one kernel set and print the verdict."""
    family, kernels, text = sys.argv[1:]
    device = torch.device(text)
    if device.type in trust.DEVICE_TYPES:
        verdict = trust.run_test(family, kernels, device)
    else:
        verdict = trust.verdict_of(self_test.run(family, kernels, device))
    print(json.dumps(asdict(verdict)))


if __name__ == "__main__":
    main()
