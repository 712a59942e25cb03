"""Traffic of collectives: predicted ones as values, and a counter of those of a real run.

Everything here speaks of **payload**: the bytes of the tensor that one rank puts into one call. For an all-reduce or a
broadcast that is the tensor, for an all-gather the part of this rank, for a send what is sent. What a payload costs on
the wire depends on the algorithm, see :func:`wire_bytes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ALL_REDUCE, ALL_GATHER, BROADCAST, SEND = "all_reduce", "all_gather", "broadcast", "send"

_NAMES = {
    "allreduce_": ALL_REDUCE,
    "allreduce_coalesced_": ALL_REDUCE,
    "allgather_": ALL_GATHER,
    "_allgather_base_": ALL_GATHER,
    "allgather_into_tensor_coalesced_": ALL_GATHER,
    "broadcast_": BROADCAST,
    "send": SEND,
}
_OUTPUT_FIRST = ("allgather_", "_allgather_base_", "allgather_into_tensor_coalesced_")
"""Operators whose first argument takes the result, and whose second one is this rank's part."""
_WITHOUT_PAYLOAD = ("recv_", "recv_any_source_", "barrier", "monitored_barrier_")


@dataclass(frozen=True)
class Message:
    """Calls of one collective for one purpose.

    Attributes:
        kind: the purpose, such as "gradients".
        collective: "all_reduce", "all_gather", "broadcast" or "send".
        bytes: payload of all calls together.
        calls: number of calls.
    """

    kind: str
    collective: str
    bytes: float
    calls: float = 1


def wire_bytes(collective: str, payload: float, ranks: int) -> float:
    """Return the bytes that a rank sends for a payload, by the ring algorithms that NCCL uses for large tensors.

    An all-reduce passes each part round the ring twice, 2 (R - 1) / R of the payload. An all-gather passes the parts of
    the R - 1 others on. A broadcast is a chain, in which every rank but the last sends all.
    """
    if ranks == 1:
        return 0.0
    factor = {ALL_REDUCE: 2 * (ranks - 1) / ranks, ALL_GATHER: ranks - 1, BROADCAST: (ranks - 1) / ranks, SEND: 1}
    return factor[collective] * payload


def by_collective(messages: Iterable[Message]) -> dict[str, tuple[float, float]]:
    """Return payload and calls of each collective."""
    found: dict[str, tuple[float, float]] = {}
    for message in messages:
        payload, calls = found.get(message.collective, (0.0, 0.0))
        found[message.collective] = payload + message.bytes, calls + message.calls
    return found


class TrafficCounter(TorchDispatchMode):
    """Counts the collectives of this thread while it is entered, on any backend.

    Each of them goes through PyTorch's dispatcher as an operator of the library ``c10d``, also the all-reduces that
    DistributedDataParallel starts in the backward pass. Collectives of other threads are not seen. A collective that
    this class does not know is an error, so that nothing goes uncounted.

    Attributes:
        calls: number of calls by (collective, dtype).
        payload: bytes by (collective, dtype), see the module.

    Raises:
        RuntimeError: in the call of an unknown collective.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, str]] = Counter()
        self.payload: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Note a collective, and do what was called."""
        if func.namespace == "c10d":
            self._note(func, args)
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: Sequence[Any]) -> None:
        name = func.overloadpacket.__name__
        if name in _WITHOUT_PAYLOAD:
            return
        if name not in _NAMES:
            raise RuntimeError(f"the collective c10d.{name} is unknown to the counter; add it to {__name__}")
        tensors = _flat(args[1 if name in _OUTPUT_FIRST else 0])
        key = _NAMES[name], str(tensors[0].dtype).removeprefix("torch.")
        self.calls[key] += 1
        self.payload[key] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def clear(self) -> None:
        """Start at zero."""
        self.calls.clear()
        self.payload.clear()

    def counted(self) -> dict[str, tuple[int, int]]:
        """Return payload and calls of each collective, of all dtypes together."""
        found: dict[str, tuple[int, int]] = {}
        for key, calls in self.calls.items():
            payload, number = found.get(key[0], (0, 0))
            found[key[0]] = payload + self.payload[key], number + calls
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop counting."""
        super().__exit__(kind, error, trace)


def _flat(value: Any) -> list[Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _flat(part)]
