"""Limits around a process that reads hostile inputs: files, network, processor time and memory."""

from __future__ import annotations

import faulthandler
import os
import resource
import signal
import sys
from pathlib import Path
from typing import IO, Any

ADDRESS_SPACE = 3 << 30
"""Bytes of address space beyond those at the start, after which an allocation fails."""

_NETWORK = (
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "socket.gethostbyname",
    "socket.sendto",
    "urllib.Request",
)
_PROGRAMS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
_CODE = ("pickle.find_class",)
_PATHS = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2,
    "os.truncate": 1, "os.chmod": 1,
    "shutil.rmtree": 1, "shutil.move": 2,
}  # fmt: skip
"""Events that change files, with the number of the last path that is changed."""
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class Forbidden(BaseException):
    """An input led to something that no input may lead to."""


class Guard:
    """Watches this process from now on; nothing can switch it off again.

    Args:
        folder: the only folder in which files may be changed.

    Attributes:
        seen: what was tried and is not allowed, since the list was last emptied.
    """

    def __init__(self, folder: Path) -> None:
        self.seen: list[str] = []
        self._folder = os.path.realpath(folder)
        self._busy = False
        sys.addaudithook(self._watch)

    def _watch(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & _WRITES) if isinstance(flags, int) else any(c in (mode or "") for c in "wax+")
            if not writes or self._inside(path):
                return
            self._refuse(f"opens {path!r} for writing")
        elif event in _PATHS:
            at = _PATHS[event]
            # A link may lead anywhere: what changes is the folder that holds it.
            if not all(self._inside(path, of_parent=True) for path in arguments[at - 1 : at]):
                self._refuse(f"{event} {arguments!r}")
        elif event in _NETWORK or event in _PROGRAMS or event in _CODE:
            self._refuse(f"{event} {arguments!r}")

    def _inside(self, path: Any, of_parent: bool = False) -> bool:
        if isinstance(path, int) or self._busy:
            return True
        self._busy = True
        try:
            text = os.path.abspath(os.fsdecode(path))
            if text == self._folder:
                return True
            real = os.path.realpath(os.path.dirname(text)) if of_parent else os.path.realpath(text)
        except (TypeError, ValueError):
            return True
        finally:
            self._busy = False
        return real.startswith(self._folder + os.sep) or real == self._folder or real == os.devnull

    def _refuse(self, what: str) -> None:
        self.seen.append(what[:300])
        raise Forbidden(what[:300])


def limit_memory() -> None:
    """Let allocations fail beyond ADDRESS_SPACE more than now."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def dump_on_timer(log: IO[str]) -> None:
    """Write the stacks of all threads to a file and end the process once the timer of :func:`start_timer` runs out.

    The stacks are written even if a thread does not return from native code.
    """
    faulthandler.enable(log)
    faulthandler.register(signal.SIGPROF, log, all_threads=True, chain=True)


def start_timer(seconds: float) -> None:
    """Allow this much processor time of all threads from now on; 0 switches the timer off."""
    signal.setitimer(signal.ITIMER_PROF, seconds)


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
