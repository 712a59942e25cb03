"""Time, traffic and memory of a run on a number of GPUs, and what bounds each stage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .machine import Machine
from .stages import INDEX_BYTES, NAME_BYTES, SIMILARITY_BYTES, Mining, Run, Training
from .traffic import ALL_GATHER, SEND, Message, wire_bytes

BACKWARD = 2
"""A backward pass takes as long as two forward passes."""


@dataclass(frozen=True)
class StagePlan:
    """Prediction for one stage on one number of ranks.

    Attributes:
        name: of the stage.
        steps: number of steps, 0 for mining.
        step_messages: collectives of a step.
        compute, decode, communication: seconds of networks and searches, of reading images, and of collectives; each
            as if it were alone. Decoding runs beside the rest.
        hidden: seconds of the communication during which something is computed.
        write: seconds in which rank 0 writes files while the others wait.
        seconds: of the stage.
        sent: bytes that a rank sends.
        device, host: bytes on each GPU and, for each rank, in host memory.
        first: bytes that rank 0 needs in host memory beyond that.
        bound: what takes longest.
    """

    name: str
    steps: int
    step_messages: tuple[Message, ...]
    compute: float
    decode: float
    communication: float
    hidden: float
    write: float
    seconds: float
    sent: float
    device: float
    host: float
    first: float
    bound: str

    def as_values(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """Prediction for a run: its stages, and why it would not work, in words."""

    ranks: int
    machines: int
    stages: tuple[StagePlan, ...]
    problems: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all stages."""
        return sum(stage.seconds for stage in self.stages)

    def as_values(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "ranks": self.ranks,
            "machines": self.machines,
            "hours": self.seconds / 3600,
            "stages": [stage.as_values() for stage in self.stages],
            "problems": list(self.problems),
        }


def plan(run: Run, machine: Machine, ranks: int) -> Plan:
    """Predict a run.

    Raises:
        ValueError: if a batch cannot be divided among so many ranks.
    """
    stages = tuple(
        _mining(stage, run, machine, ranks) if isinstance(stage, Mining) else _training(stage, run, machine, ranks)
        for stage in run.stages
    )
    return Plan(ranks, machine.machines(ranks), stages, tuple(_problems(stages, machine, ranks)))


def _training(stage: Training, run: Run, machine: Machine, ranks: int) -> StagePlan:
    rate = machine.flops(stage.side)
    images = min(stage.batch, stage.images) / ranks
    forward = 2 * stage.network.multiply_adds / rate
    trained = sum(stage.network.parameters)
    if stage.trained + stage.forward:
        step = images * (stage.trained * (1 + BACKWARD) + stage.forward) * forward
    else:
        # Heads on kept features: a product of each weight with the features of an image and with those of a neighbour.
        step = images * 2 * (1 + BACKWARD) * 2 * trained / rate
    messages = stage.messages(ranks)
    gradients = machine.seconds([m for m in messages if m.kind == "gradients"], ranks)
    rest = machine.seconds([m for m in messages if m.kind != "gradients"], ranks)
    hidden = min(gradients, machine.overlap * images * stage.trained * BACKWARD * forward)
    decode = _decoding(machine, run.crop, images * stage.decoded * ranks, ranks)
    once = (stage.checked + stage.before) / ranks * forward
    once_decode = _decoding(machine, run.crop, stage.checked + stage.before, ranks)
    once += 2 * stage.compared / ranks / machine.search_flops
    gathers = []
    if ranks > 1:
        gathers = [
            Message("results", ALL_GATHER, 4 * stage.gathered / ranks),
            Message("blocks", SEND, stage.ring * (ranks - 1) / ranks),
        ]
    gathering = machine.seconds(gathers, ranks)
    device = (
        4 * (trained * (2 + stage.state) + stage.network.frozen)
        + 2 * stage.network.activations * images * stage.trained
        + stage.kept
        + stage.widest
    )
    return _stage_plan(
        name=stage.name,
        steps=stage.steps,
        step_messages=tuple(messages),
        compute=stage.steps * step + once,
        decode=stage.steps * decode + once_decode,
        communication=stage.steps * (gradients + rest) + gathering,
        hidden=stage.steps * hidden,
        write=0.0,
        seconds=stage.steps * max(decode, step + gradients + rest - hidden) + max(once, once_decode) + gathering,
        sent=stage.steps * _sent(messages, ranks) + _sent(gathers, ranks),
        device=device,
        host=_held(run) + 4.0 * (run.images + run.test) * run.classes * (stage.name != "pretext"),
        first=0.0,
    )


def _mining(stage: Mining, run: Run, machine: Machine, ranks: int) -> StagePlan:
    forward = 2 * stage.network.multiply_adds / machine.flops(stage.side)
    passing = stage.checked / ranks * forward
    decode = _decoding(machine, run.crop, stage.checked, ranks)
    search = 2 * stage.images**2 * stage.dimensions / ranks / machine.search_flops
    if ranks == 1:
        search /= 2  # each pair once
    messages = stage.messages(ranks)
    blocks = machine.seconds([m for m in messages if m.kind == "blocks"], ranks)
    rest = machine.seconds([m for m in messages if m.kind != "blocks"], ranks)
    # Rank 0 receives what the others send, one after another.
    rate = machine.link if ranks <= machine.gpus else min(machine.link, machine.network)
    to_first = sum(m.bytes for m in messages if m.kind.endswith("to rank 0")) * (ranks - 1) / rate
    rest += to_first
    hidden = min(blocks, search)
    rows, lists = 4.0 * stage.images * stage.dimensions, _lists(run)
    write = (rows + lists) / machine.disk
    return _stage_plan(
        name=stage.name,
        steps=0,
        step_messages=tuple(messages),
        compute=passing + search,
        decode=decode,
        communication=blocks + rest,
        hidden=hidden,
        write=write,
        seconds=max(passing, decode) + search + blocks - hidden + rest + write,
        sent=_sent(messages, ranks),
        device=3 * rows / ranks + 4 * (INDEX_BYTES + SIMILARITY_BYTES) * stage.images / ranks * stage.k,
        host=_held(run),
        first=rows + lists,
    )


def _stage_plan(**values: Any) -> StagePlan:
    shown = {
        "computing": values["compute"],
        "reading images": values["decode"],
        "communication": values["communication"] - values["hidden"],
        "rank 0 writing": values["write"],
    }
    return StagePlan(**values, bound=max(shown, key=lambda name: shown[name]))


def _decoding(machine: Machine, crop: str, images: float, ranks: int) -> float:
    """Return the seconds for reading images on all cores of all machines; of one GPU, on its share of the cores.

    Centre squares (``data.crop=image``) are kept in memory, and reading them once does not count.
    """
    if crop == "image":
        return 0.0
    cores = machine.cores * min(ranks / machine.gpus, machine.machines(ranks))
    return images / (machine.decoded[crop] * cores)


def _sent(messages: Iterable[Message], ranks: int) -> float:
    return sum(wire_bytes(message.collective, message.bytes, ranks) for message in messages)


def _lists(run: Run) -> float:
    return float(run.images) * run.k * (INDEX_BYTES + SIMILARITY_BYTES)


def _held(run: Run) -> float:
    """Return the bytes that every rank keeps of all images: their names, their neighbours, an epoch's order."""
    return float(run.images) * (NAME_BYTES + run.k * INDEX_BYTES + INDEX_BYTES)


def _problems(stages: Iterable[StagePlan], machine: Machine, ranks: int) -> Iterable[str]:
    local = min(ranks, machine.gpus)
    for stage in stages:
        if stage.device > machine.memory:
            yield (f"{stage.name}: {amount(stage.device)} for each GPU, which has {amount(machine.memory)}")
        host = local * stage.host + stage.first
        if host > machine.host_memory:
            more = f", and {amount(stage.first)} more for rank 0" if stage.first else ""
            yield (
                f"{stage.name}: {amount(host)} of host memory on the machine of rank 0, which has "
                f"{amount(machine.host_memory)} ({local} ranks with {amount(stage.host)} each{more})"
            )


def duration(seconds: float) -> str:
    """Return a time in words."""
    for unit, factor in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1), ("ms", 1e-3)):
        if seconds >= (1 if unit == "s" else 2) * factor or unit == "ms":
            return f"{seconds / factor:.2g} {unit}" if seconds < 100 * factor else f"{seconds / factor:,.0f} {unit}"
    raise AssertionError


def amount(size: float) -> str:
    """Return a number of bytes in words, in powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"
