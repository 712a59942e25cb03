"""The end of the ranks of a run: together, within a minute, and with one message.

A rank that fails leaves the others waiting for it in a collective, for as long as the backend allows. So a thread on
each rank looks every second whether another one has failed, and whether the next rank still lives. The processes talk
through the store by which they met. Whoever fails first prints why; the others end without a word.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ..errors import RankError, first_line
from ..text import shown
from . import ranks

POLL_SECONDS = 1.0
"""Time between two looks at the store."""
BEAT_SECONDS = 2.0
"""Time between two signs of life of a rank."""
GRACE_SECONDS = 5.0
"""Time in which a rank that has failed says why, if another one already notices that it is gone."""
HEAD_START_SECONDS = 0.5
"""Time by which rank 0 comes before the others if all fail at once."""
EXIT_OF_OTHERS = 3
"""Exit code of a rank that ends because another one has failed."""

CONTINUES = "the same command continues"
"""The end of a message about what is not the run's own fault."""

_CLAIMS, _MESSAGE = "failures", "failed"


class Guard:
    """Watches the other ranks in a thread, and ends this process if one of them has failed.

    Args:
        store: a connection to the store that nothing else uses.
        meeting: what to say if the ranks get no further than :meth:`connecting`, and after how many seconds.
        holds: this process holds the store.
        silent: seconds after which a rank without a sign of life, or a store without an answer, is taken for dead.
    """

    def __init__(self, store: Any, meeting: tuple[str, float], holds: bool, silent: float) -> None:
        self.holds = holds
        self._silent = silent
        self._store = store
        self._meeting = meeting
        self._begin: float | None = None
        self._processes: dict[int, tuple[int, str]] = {}
        self._speaking, self._spoken = threading.Lock(), False
        self._joined = False
        self._leaving = threading.Event()
        self._beats = 0
        place = ranks.current()
        self._rank, self._world = place.rank, place.world
        self._store.set(f"process/{self._rank}", f"{os.getpid()} {socket.gethostname()}")
        self._looked = time.monotonic()
        self._threads = [
            threading.Thread(target=target, name="guard", daemon=True) for target in (self._watch, self._watch_store)
        ]
        for thread in self._threads:
            thread.start()

    def connecting(self) -> None:
        """Note that all ranks have come, and connect with each other now."""
        for rank in range(self._world):
            number, _, host = self._store.get(f"process/{rank}").decode().partition(" ")
            self._processes[rank] = int(number), host
        self._begin = time.monotonic()

    def joined(self) -> None:
        """Note that all ranks have met."""
        self._joined = True

    def leaving(self) -> None:
        """Note that this rank has done its work, so that nobody misses it."""
        self._leaving.set()
        for thread in self._threads:
            thread.join()
        self._note_end("ended", GRACE_SECONDS)

    def claim(self, message: str) -> bool:
        """Tell the others that this rank has failed; return if it is the first one, which prints the message."""
        # If all ranks fail alike, as with a setting that is not possible, rank 0 says so.
        if self._rank and self.has_failed(HEAD_START_SECONDS):
            return False
        try:
            first = self._store.add(_CLAIMS, 1) == 1
            if first:
                self._store.set(_MESSAGE, message)
        except Exception:  # the store is gone
            return self._speaks_alone()
        with self._speaking:
            first, self._spoken = first and not self._spoken, True
        return bool(first)

    def depart(self) -> None:
        """Note that this rank ends after a failure."""
        self._note_end("departed", GRACE_SECONDS)

    def _note_end(self, how: str, seconds: float) -> None:
        """Note the end of this rank. The one whose process holds the store waits some seconds for the others."""
        try:
            self._store.set(f"{how}/{self._rank}", "1")
            keys = [f"{how}/{rank}" for rank in range(self._world)]
            end = time.monotonic() + (seconds if self.holds else 0.0)
            while time.monotonic() < end and not self._store.check(keys):
                time.sleep(0.05)
        except Exception:  # the store is gone
            return

    def has_failed(self, seconds: float = 0.0) -> bool:
        """Return whether a rank has failed, after waiting some seconds for it to say so."""
        end = time.monotonic() + seconds
        while True:
            try:
                if self._store.check([_MESSAGE]):
                    return True
            except Exception:
                return False
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)

    def dead(self) -> str | None:
        """Return in words which process of this machine has ended without a word, None if all live."""
        here = socket.gethostname()
        for rank, (process, host) in self._processes.items():
            if rank != self._rank and host == here and not _lives(process) and not self._has_ended(rank):
                return f"rank {rank} (process {process}) was killed or ran out of memory"
        return None

    def _has_ended(self, rank: int) -> bool:
        try:
            return bool(self._store.check([f"ended/{rank}"]))
        except Exception:  # the store is gone, so its holder has not ended as it should
            return False

    def _watch(self) -> None:
        watched, last, seen, beat = (self._rank + 1) % self._world, time.monotonic(), b"", 0.0
        while not self._leaving.wait(POLL_SECONDS):
            try:
                now = self._looked = time.monotonic()
                if now - beat >= BEAT_SECONDS:
                    beat, self._beats = now, self._beats + 1
                    self._store.set(f"beat/{self._rank}", str(self._beats))
                if self._store.check([_MESSAGE]):
                    # Whoever can end by itself, does: rank 0 may be writing a checkpoint.
                    if not self._leaving.wait(GRACE_SECONDS):
                        self._exit()
                    return
                if not self._joined:
                    if self._begin is not None and now - self._begin > self._meeting[1]:
                        self._end(self._meeting[0])
                    continue
                key = f"beat/{watched}"
                found = self._store.get(key) if self._store.check([key]) else b""
                if found != seen:
                    seen, last = found, now
                elif now - last > self._silent and not self._has_ended(watched):
                    process, host = self._processes[watched]
                    self._end(
                        f"rank {watched} (process {process} on {host}) has given no sign of life for "
                        f"{self._silent:.0f} s: it was killed, it hangs, or its machine is gone"
                    )
                # Its last words may be on their way.
                elif (words := self.dead()) is not None and not self.has_failed(GRACE_SECONDS / 2):
                    self._end(words)
            except Exception as error:
                if self._leaving.is_set():
                    return
                self._end(
                    self.dead()
                    or "the store by which the ranks have met is gone, and with it the process or the machine of "
                    f"rank 0 ({type(error).__name__})"
                )

    def _watch_store(self) -> None:
        """End this process if the store does not answer, as after a cut of the network: nothing else would notice."""
        while not self._leaving.wait(POLL_SECONDS):
            looked = self._looked
            if time.monotonic() - looked > self._silent:
                # If this process itself was stopped, the other thread looks again now.
                if self._leaving.wait(GRACE_SECONDS) or self._looked != looked:
                    continue
                if self._speaks_alone():
                    _say(
                        f"the store by which the ranks have met has not answered for {self._silent:.0f} s: the machine "
                        f"of rank 0, or the network to it, is gone; {CONTINUES}"
                    )
                exit_now(EXIT_OF_OTHERS)

    def _speaks_alone(self) -> bool:
        """Return whether this rank speaks for its machine if the ranks cannot agree on one that does."""
        place = ranks.current()
        with self._speaking:
            first, self._spoken = (place.local_rank == 0 or place.rank == 1) and not self._spoken, True
        return first

    def _end(self, words: str) -> None:
        message = f"{words}; {CONTINUES}"
        if self.claim(message):
            _say(message)
            record(message)
        self._exit()

    def _exit(self) -> None:
        self.depart()
        exit_now(EXIT_OF_OTHERS)


def _say(message: str) -> None:
    print(shown(f"scan-fast: {message}"), file=sys.stderr, flush=True)


def _lives(process: int) -> bool:
    """Return whether a process of this machine lives; one whose parent has not yet noticed its end does not."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return not Path("/proc").is_dir()
    except (OSError, IndexError):
        return True


def exit_now(code: int) -> None:
    """End this process: what waits for other ranks would wait for ever."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def record(message: str) -> None:
    """Leave the message in the file that torchrun reads, so that its own summary shows it."""
    if os.environ.get("TORCHELASTIC_ERROR_FILE"):
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(RankError(message))


_guard: Guard | None = None
_guarded = False
"""True once this process has been one of several."""


def start(store: Any, meeting: tuple[str, float], holds: bool, silent: float) -> Guard:
    """Start the guard of this process, see :class:`Guard`."""
    global _guard, _guarded
    _guard, _guarded = Guard(store, meeting, holds, silent), True
    return _guard


def stop() -> None:
    """End the guard of this process, after its work is done."""
    global _guard
    if _guard is not None:
        _guard.leaving()
        _guard = None


def cause(error: Exception) -> Exception:
    """Return what has gone wrong: for an error of a connection between ranks, the reason why one of them is gone."""
    if _guard is None or not _of_connection(error):
        return error
    words = None if _guard.has_failed() else _guard.dead()
    if words is None and not _guard.has_failed(GRACE_SECONDS / 2):
        words = _guard.dead()
    return RankError(f"{words or f'the ranks have lost each other ({first_line(error)})'}; {CONTINUES}")


def announce(message: str, error: Exception) -> str | None:
    """Tell the other ranks that this one has failed.

    Args:
        message: why, in words.
        error: the exception.

    Returns:
        The message to print, which names the rank; None if another rank prints why the run has ended.
    """
    if _guard is None:
        # A rank that could not meet the others speaks for itself.
        return message if is_first_by_environment() or isinstance(error, RankError) else None
    rank = ranks.current().rank
    if rank and not isinstance(error, RankError):
        message = f"rank {rank}: {message}"
    if not _guard.claim(message):
        return None
    record(message)
    return message


def end(code: int, *, exits: bool = True) -> int:
    """Take this rank's leave, whether it has failed or not, and return an exit code.

    Args:
        code: the exit code.
        exits: end this process at once if it was one of several. Threads of gloo may still hold objects of Python, and
            the interpreter would abort while it ends.
    """
    if _guard is not None:
        _guard.depart()
    if _guarded and exits:
        exit_now(code)
    return code


def is_first_by_environment() -> bool:
    """Return whether this process is rank 0 by what torchrun has told it, or was started without torchrun."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def _of_connection(error: BaseException) -> bool:
    """Return whether an error only says that another rank cannot be reached."""
    import torch.distributed as dist

    if isinstance(error, (dist.DistNetworkError, dist.DistBackendError, dist.DistStoreError)):
        return True
    return isinstance(error, RuntimeError) and any(
        word in str(error)
        for word in ("Connection closed by peer", "Connection reset by peer", "gloo/transport", "NCCL")
    )
