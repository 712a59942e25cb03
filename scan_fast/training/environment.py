"""The environment of a run, on which its bits depend: noted at the start, and compared later."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import torch

from .. import __version__, distributed
from ..devices import processor_name
from ..distributed.joining import package_digest
from ..models.weight_files import file_digest
from ..ops import native
from ..runs import artifacts
from ..runs.environment import EnvironmentRecord, Facts
from ..runs.folder import RunFolder


def environment(device: torch.device) -> dict[str, str | int]:
    """Return what this process computes with.

    Sums of several threads are added up in another order than those of one, so gradients differ in their last bits;
    libraries choose their kernels by the processor and its instructions.
    """
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "scan-fast": __version__,
        "source": package_digest()[:12],
        "kernels": kernels_digest(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": gpu or device.type,
        "processes": distributed.current().world,
    }


def note_environment(run: RunFolder, now: Facts, *, afresh: bool = False) -> list[str]:
    """Note the environment of a run that has no results yet; return in words what has changed since then.

    The changes go to the entries in summary.json of the stages that this process works on. With several ranks, all must
    call this.

    Args:
        run: the run folder.
        now: the environment of this process.
        afresh: the results are to be removed, so this is a new start.
    """
    begun = run.has_results() and run.has(artifacts.ENVIRONMENT) and not afresh
    record = run.read(artifacts.ENVIRONMENT) if begun else None
    if record is None:
        run.write(artifacts.ENVIRONMENT, EnvironmentRecord(dict(now)))
        return []
    changed = distributed.agreed(record.changed(now))
    run.changes = tuple(changed)
    return changed


@functools.cache
def kernels_digest() -> str:
    """Return 12 hexadecimal digits of a hash of the compiled kernels, "none" without them."""
    if not native.is_available():
        return "none"
    module = importlib.util.find_spec("scan_fast._C")
    assert module is not None and module.origin is not None
    return file_digest(Path(module.origin))[:12]
