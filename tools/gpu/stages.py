"""The stages of the GPU suite: their order, limits, and the processes that each of them runs. Standard library only."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import carried, conclusions
from .jobs import Job

PEERS = ("inf_cl", "memeff", "siglip_kernel")
COMPLAINTS = r"^=+ *(Invalid|Misaligned|Uninitialized|Race reported|Error: |Barrier|Divergent|Out[- ]of|Stack over)"
REFUSALS = ("Device not supported", "Unable to find", "terminated before first instrumented", "Failed to initialize")
"""Messages of compute-sanitizer on a machine on which it does not work."""


@dataclass(frozen=True)
class Where:
    """Circumstances of a stage.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal.
        seconds: time limit of the stage.
        folder: the folder that was carried along, if any.
        patience: factor of the time after which a silent process counts as hung.
        wanted: the stages of this run.
    """

    device: str
    seconds: float
    folder: Path | None = None
    patience: float = 1.0
    wanted: tuple[str, ...] = ()

    @property
    def rehearse(self) -> bool:
        """True in a rehearsal."""
        return self.device == "cpu"


Maker = Callable[[Where, tuple[str, ...]], list[Job]]


@dataclass(frozen=True)
class Stage:
    """A stage.

    Attributes:
        name: of the stage.
        seconds: its time limit.
        need: seconds that earlier stages leave to it if they do not decide about a kernel.
        at_a_time: the number of its processes that run at the same time.
        jobs: makes the processes for some kernel sets.
        beside: makes processes that run at the same time, for a later stage.
    """

    name: str
    seconds: float
    need: float
    at_a_time: int
    jobs: Maker
    beside: Maker = lambda where, sets: []


def _python(where: Where, module: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", f"tools.gpu.{module}", *words, "--device", where.device)


def _checks(check: str, size: str, stage: str = "") -> Maker:
    def make(where: Where, sets: tuple[str, ...]) -> list[Job]:
        words = (check, "--stage", stage or check, "--size", "tiny" if where.rehearse else size, "--sets")
        # On a CPU the kernels run one after the other: more processes would only load torch again and again.
        groups = [sets] if where.rehearse else [(s,) for s in sets]
        # Many processes, each of which computes references on the CPU.
        threads = {} if where.rehearse else {"OMP_NUM_THREADS": "4"}
        return [
            Job(_python(where, "checks", *words, *group), group, threads, patience=20 * where.patience)
            for group in groups
            if group
        ]

    return make


def _timings(stage: str, *options: str) -> Maker:
    def make(where: Where, sets: tuple[str, ...]) -> list[Job]:
        if not sets:
            return []
        words = ["--stage", stage, *options, "--seconds", f"{0.85 * where.seconds:.0f}"]
        words += ["--quick"] if where.rehearse else []
        path = peers_path(where.folder) if stage == "peers" else {}
        return [Job(_python(where, "timings", *words, "--sets", *sets), sets, path, patience=45 * where.patience)]

    return make


def peers_path(folder: Path | None) -> dict[str, str]:
    """Return the environment in which the peers whose wheels were carried along can be imported."""
    there = {path.name.split("-")[0] for path in (folder / carried.WHEELS).glob("*.whl")} if folder else set()
    names = tuple(name for name in PEERS if name in there)
    if not names:
        return {}
    try:
        return {"PYTHONPATH": str(carried.wheels(folder or "", names))}
    except carried.CarriedError as error:
        print(f"    {error}", flush=True)
        return {}


def _step(where: Where, sets: tuple[str, ...]) -> list[Job]:
    words = ["--seconds", f"{0.7 * where.seconds:.0f}", *(["--quick"] if where.rehearse else []), "--sets", *sets]
    return [Job(_python(where, "step", *words), patience=60 * where.patience)] if sets else []


def _compiling(where: Where, sets: tuple[str, ...]) -> list[Job]:
    """Fill the cache of torch.compile on all cores, so that the timings need not wait for it.

    In a rehearsal only the last family is compiled: on two cores it takes as long as it saves.
    """
    found = []
    threads = {"TORCHINDUCTOR_COMPILE_THREADS": "4", "OMP_NUM_THREADS": "4"}
    if "timings" in where.wanted:
        portable = [s for s in sets if s.endswith(":portable")]
        quick = ("--quick",) if where.rehearse else ()
        commands = [
            _python(where, "timings", "--compile", *quick, "--sets", name)
            for name in (portable[-1:] if where.rehearse else portable)
        ]
        found += [Job(command, (), threads, prepares=True) for command in commands]
    if "step" in where.wanted and not where.rehearse:
        found += [Job((*job.command, "--compile"), (), threads, prepares=True) for job in _step(where, sets)]
    return found


def sanitizer() -> str | None:
    """Return the path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def _sanitizer(tool: str) -> Maker:
    def make(where: Where, sets: tuple[str, ...]) -> list[Job]:
        command = _python(where, "checks", "call", "--stage", tool, "--size", "tiny", "--sets", *sets)
        if where.rehearse:
            return [Job(command, sets)] if tool == "memcheck" and sets else []
        path = sanitizer()
        if path is None or not sets:
            return []
        # Our kernels alone, not those of PyTorch. Without PyTorch's cache each tensor is a separate allocation, so that
        # the tool sees its bounds.
        prefix = (path, "--tool", tool, "--kernel-regex", "kns=scan_fast", "--error-exitcode", "9")
        prefix += ("--target-processes", "all", *(("--report-api-errors", "no") if tool == "memcheck" else ()))
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return [Job((*prefix, *command), sets, uncached, patience=45, startup=90, complaints=COMPLAINTS)]

    return make


STAGES = (
    Stage("smoke", 30, 0, 8, _checks("accuracy", "smoke", "smoke")),
    Stage("accuracy", 60, 30, 8, _checks("accuracy", "full"), _compiling),
    Stage("timings", 70, 0, 1, _timings("timings")),
    Stage("repeat", 30, 15, 8, _checks("repeat", "smoke")),
    Stage("graph", 30, 15, 8, _checks("graph", "smoke")),
    Stage("step", 60, 0, 1, _step),
    Stage("memcheck", 75, 45, 1, _sanitizer("memcheck")),
    Stage("initcheck", 40, 0, 1, _sanitizer("initcheck")),
    Stage("racecheck", 40, 0, 1, _sanitizer("racecheck")),
    Stage("peers", 40, 0, 1, _timings("peers", "--peers")),
    Stage("more", 90, 0, 1, _timings("more", "--more")),
)
NAMES = tuple(stage.name for stage in STAGES)


def kept_for_later(name: str, wanted: tuple[str, ...]) -> float:
    """Return the seconds that a stage leaves to later ones that decide about a kernel; none if it decides, too."""
    if name in conclusions.GATING:
        return 0.0
    after = STAGES[NAMES.index(name) + 1 :]
    return sum(stage.need for stage in after if stage.name in wanted)
