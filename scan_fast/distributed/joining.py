"""Meeting of the processes that torchrun has started, and their parting."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import socket
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from ..errors import RankError, first_line
from . import guard, ranks

JOIN_SECONDS = "SCAN_FAST_JOIN_SECONDS"
"""Environment variable: seconds within which all ranks must have met."""
SILENT_SECONDS = "SCAN_FAST_SILENT_SECONDS"
"""Environment variable: seconds without a sign of life after which a rank is taken for dead."""
SECONDS = {JOIN_SECONDS: 50.0, SILENT_SECONDS: 40.0}
"""The values of these variables if they are not set."""
LONGEST = timedelta(days=7)
"""Longest collective. Ranks wait for rank 0 while it groups or reports; the guard finds those that are gone."""


def join() -> ranks.Ranks:
    """Meet the other processes, if torchrun has started this one; return the place of this process.

    torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT. A launcher that sets
    these will do as well. With a GPU, process N of a machine takes GPU N.

    Raises:
        RankError: if a variable is missing or wrong, if the ranks do not meet within ``SCAN_FAST_JOIN_SECONDS`` (50 by
            default), or if they run different code.
    """
    place = _place()
    if place.world == 1 or ranks.current().world > 1:
        return ranks.current()
    seconds, silent = _seconds(JOIN_SECONDS), _seconds(SILENT_SECONDS)
    store = _store(place, seconds)
    ranks.enter(place)
    meeting = (
        f"the ranks have found {_address()}, but not each other, within {seconds:.0f} s: GLOO_SOCKET_IFNAME, and with "
        "GPUs NCCL_SOCKET_IFNAME, must name the network interface between the machines; once it does",
        seconds,
    )
    # A launcher that starts the ranks again uses the same store.
    name = f"scan-fast/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    own = PrefixStore(name, store)
    watching = guard.start(PrefixStore(f"{name}/guard", store.clone()), meeting, _holds(place), silent)
    _wait_for_all(own, place, seconds)
    watching.connecting()
    gpu = torch.cuda.is_available() and place.local_rank < torch.cuda.device_count()
    if gpu:
        torch.cuda.set_device(place.local_rank)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=own, rank=place.rank, world_size=place.world, timeout=LONGEST)
    _check_code()
    watching.joined()
    return place


def leave() -> None:
    """Part from the other processes, once all of them have done their work."""
    if ranks.current().world == 1:
        return
    ranks.wait()
    guard.stop()
    dist.destroy_process_group()
    ranks.enter(ranks.Ranks())


def _place() -> ranks.Ranks:
    if "WORLD_SIZE" not in os.environ:
        return ranks.Ranks()
    values = {}
    for name, default in (
        ("WORLD_SIZE", None),
        ("RANK", None),
        ("LOCAL_RANK", "RANK"),
        ("LOCAL_WORLD_SIZE", "WORLD_SIZE"),
    ):
        text = os.environ.get(name, os.environ.get(default) if default else None)
        if text is None or not text.isdecimal():
            given = "it is not set" if text is None else f"got {text!r}"
            raise RankError(f"WORLD_SIZE is set, so {name} must be a whole number, as torchrun sets it; {given}")
        values[name] = int(text)
    place = ranks.Ranks(values["RANK"], values["WORLD_SIZE"], values["LOCAL_RANK"], values["LOCAL_WORLD_SIZE"])
    if not place.rank < place.world or not place.local_rank < place.local_world <= place.world:
        raise RankError(
            f"RANK must be below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, got {place.rank} of {place.world} "
            f"and {place.local_rank} of {place.local_world}"
        )
    return place


def _seconds(name: str) -> float:
    text = os.environ.get(name, str(SECONDS[name]))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise RankError(f"{name} must be a number of seconds above 0, got {text!r}")
    return seconds


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


def _store(place: ranks.Ranks, seconds: float) -> TCPStore:
    """Connect to the store of torchrun, or make that of the run."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise RankError(
            f"MASTER_ADDR and MASTER_PORT must name rank 0's machine and a free port of it, as torchrun sets them; got "
            f"{host!r} and {port!r}"
        )
    holds = _holds(place)
    try:
        if not holds:
            _await_store(host, int(port), seconds)
        return TCPStore(
            host,
            int(port),
            place.world,
            is_master=holds,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (OSError, RuntimeError, ValueError) as error:
        does = "open" if holds else "reach"
        raise RankError(
            f"rank {place.rank} on {socket.gethostname()} cannot {does} MASTER_ADDR:MASTER_PORT, {host}:{port}, within "
            f"{seconds:.0f} s ({first_line(error)[:200]}); it must be an address of rank 0's machine with a port that "
            "the others may reach"
        ) from error


def _await_store(host: str, port: int, seconds: float) -> None:
    """Return once the store can be reached. The store's own client may try for much longer than it is told to.

    Raises:
        OSError: if it cannot be reached in time.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.1, end - time.monotonic())).close()
            return
        except OSError:
            if time.monotonic() + 0.5 >= end:
                raise
            time.sleep(0.5)


def _holds(place: ranks.Ranks) -> bool:
    """Return whether this process holds the store. torchrun itself may, and then rank 0 is a client, too."""
    return place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _wait_for_all(store: Store, place: ranks.Ranks, seconds: float) -> None:
    keys = [f"here/{rank}" for rank in range(place.world)]
    store.set(keys[place.rank], socket.gethostname())
    try:
        store.wait(keys, timedelta(seconds=seconds))
    except RuntimeError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise RankError(
            f"of {place.world} ranks, {len(missing)} have not come to {_address()} within {seconds:.0f} s: rank "
            f"{shown}; start as many processes as WORLD_SIZE says ({JOIN_SECONDS} lets slow ones take longer)"
        ) from error


def _check_code() -> None:
    """Compare what the ranks run.

    Raises:
        RankError: names what differs, and on which ranks.
    """
    own = code()
    facts = ranks.gathered({**own, "machine": socket.gethostname()})
    for name in own:
        others = [rank for rank, fact in enumerate(facts) if fact[name] != facts[0][name]]
        if others:
            rank = others[0]
            raise RankError(
                f"the ranks run different code: rank 0 on {facts[0]['machine']} has {name} {facts[0][name]}, rank "
                f"{rank} on {facts[rank]['machine']} has {facts[rank][name]}; install the same on all machines"
            )


@functools.cache
def package_digest() -> str:
    """Return 16 hexadecimal digits of a hash of this package's Python files."""
    state = hashlib.blake2b(digest_size=8)
    package = Path(__file__).resolve().parents[1]
    for file in sorted(package.rglob("*.py")):
        state.update(file.relative_to(package).as_posix().encode())
        state.update(file.read_bytes())
    return state.hexdigest()


def code() -> dict[str, str]:
    """Return what results depend on besides data and configuration: versions, and a digest of this package."""
    from .. import __version__

    return {
        "scan-fast": f"{__version__} ({package_digest()})",
        "PyTorch": torch.__version__,
        "Python": ".".join(platform.python_version_tuple()[:2]),
    }
