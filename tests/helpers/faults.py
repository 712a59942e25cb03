"""Faults of the system at any call that changes a folder: kills, full and broken disks, writes that are cut short.

:class:`Fault` goes into a process of :class:`driving.Process` and watches the calls below one folder: those of the
module ``os`` that change the file system, opening for writing, and every write that a file of Python hands to the
system. Files that compiled code opens by itself are not seen.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from driving import Process, Result, results, without_seconds

BY_PATH = ("mkdir", "rmdir", "unlink", "remove", "chmod", "truncate", "utime")
BY_TWO_PATHS = ("replace", "rename", "link", "symlink")
BY_HANDLE = ("fsync", "fdatasync", "ftruncate")
CALLS = ("open", "write", *BY_PATH, *BY_TWO_PATHS, *BY_HANDLE)
"""The calls that are watched."""

WAYS = ("kill before", "kill after", "EIO", "ENOSPC")
WAYS_OF_WRITES = (*WAYS, "short write", "short write, ENOSPC")
"""What can happen at a call: death before or after it, an error instead of it, half of a write and then either."""
LOSSES = ("delete the folder", "move the folder")
"""What can happen after a call besides; no command can go on then."""


@dataclass(frozen=True)
class Fault:
    """What happens at one call.

    Attributes:
        folder: calls that concern this folder, or what is in it, count.
        log: a file outside of it; each call adds a line with its name and its file.
        call: one of CALLS, or "any"; "" for none: calls are only noted.
        at: the number of the call, from 1.
        way: one of WAYS or LOSSES or, for a write, of WAYS_OF_WRITES.
    """

    folder: str
    log: str
    call: str = ""
    at: int = 0
    way: str = ""

    def arrange(self) -> None:
        """Watch the calls of this process from now on."""
        _Watch(self).arrange()


class _Watch:
    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.folder = os.path.realpath(fault.folder)
        self.seen = 0
        self.lock = threading.RLock()
        self.log = os.open(fault.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.inside = threading.local()
        self.opened = io.open
        self.written = os.write

    def arrange(self) -> None:
        for name in (*BY_PATH, *BY_TWO_PATHS, *BY_HANDLE):
            setattr(os, name, self.watched(name, getattr(os, name)))
        os.open = self.os_open(os.open)
        os.write = self.os_write(os.write)
        io.open = builtins.open = self.open_file

    def concerns(self, *places: Any) -> bool:
        for place in places:
            try:
                path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fsdecode(place)
            except (OSError, TypeError):
                continue
            if os.path.abspath(path).startswith((self.folder + os.sep, self.folder + " ")) or path == self.folder:
                return True
        return False

    def due(self, call: str, place: Any) -> str:
        """Note a call; return what is to happen at it."""
        with self.lock:
            name = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else os.fsdecode(place)
            self.written(self.log, f"{call}\t{name}\n".encode())
            if self.fault.call not in (call, "any"):
                return ""
            self.seen += 1
            return self.fault.way if self.seen == self.fault.at else ""

    def carry_out(self, way: str, place: Any, function: Callable[[], Any]) -> Any:
        if way == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if way in ("EIO", "ENOSPC"):
            number = getattr(errno, way)
            raise OSError(number, os.strerror(number), None if isinstance(place, int) else os.fsdecode(place))
        result = function()
        if way == "kill after":
            os.kill(os.getpid(), signal.SIGKILL)
        if way == "delete the folder":
            shutil.rmtree(self.folder)
        if way == "move the folder":
            os.rename(self.folder, f"{self.folder}-moved")
        return result

    def watched(self, call: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(place: Any, *rest: Any, **named: Any) -> Any:
            if not self.concerns(place, *(rest[:1] if call in BY_TWO_PATHS else ())):
                return function(place, *rest, **named)
            return self.carry_out(self.due(call, place), place, lambda: function(place, *rest, **named))

        return replaced

    def os_open(self, function: Callable[..., int]) -> Callable[..., int]:
        def replaced(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or not self.concerns(path):
                return function(path, flags, *rest, **named)
            return int(self.carry_out(self.due("open", path), path, lambda: function(path, flags, *rest, **named)))

        return replaced

    def os_write(self, function: Callable[..., int]) -> Callable[..., int]:
        def replaced(handle: int, data: Any) -> int:
            return self.write(handle, data, lambda part: function(handle, part))

        return replaced

    def write(self, handle: int, data: Any, function: Callable[[Any], int]) -> int:
        if not self.concerns(handle):
            return function(data)
        way = self.due("write", handle)
        if way.startswith("short write"):
            function(memoryview(data)[: len(data) // 2])
            way = "kill before" if way == "short write" else "ENOSPC"
        return int(self.carry_out(way, handle, lambda: function(data)))

    def open_file(self, file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **named: Any) -> Any:
        if not set(mode) & set("wax+") or not self.concerns(file):
            return self.opened(file, mode, buffering, *rest, **named)
        watch, binary = self, "b" in mode

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                return watch.write(self.fileno(), data, super().write)

        closing = named.pop("closefd", True)
        way = "" if isinstance(file, int) else self.due("open", file)
        plain = mode.replace("b", "").replace("t", "")
        raw = self.carry_out(way, file, lambda: Raw(file, plain, closefd=closing))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if binary else io.TextIOWrapper(buffered, *rest, **named)


def points(log: Path) -> dict[str, int]:
    """Return how often each call was made, from the log of a process that ended by itself."""
    return dict(Counter(line.partition("\t")[0] for line in log.read_text(errors="replace").splitlines()))


def faults(counted: dict[str, int], folder: Path, log: Path) -> list[Fault]:
    """Return every fault at every call."""
    return [
        Fault(str(folder), str(log), call, number, way)
        for call, count in sorted(counted.items())
        for number in range(1, count + 1)
        for way in (WAYS_OF_WRITES if call == "write" else WAYS)
    ]


def check_end(fault: Fault, result: Result) -> str:
    """Check how a process with a fault has ended; return "killed", "refused", "tolerated" or "not reached"."""
    if "kill" in fault.way or fault.way == "short write":
        # An order of two threads in which the call comes never is possible.
        assert result.code in (0, -signal.SIGKILL), (result.code, result.err)
        return "killed" if result.code else "not reached"
    if result.code == 0:
        return "tolerated"
    result.refusal()
    return "refused"


def leftovers(folder: Path) -> list[str]:
    """Return the temporary files below a folder."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.tmp"))


def state(folder: Path) -> dict[str, Any]:
    """Return all that two equal runs agree in, the names of their files included.

    The checkpoints of finished stages do not count: repeating begins with their removal, and a kill may follow at once.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names -= {name for name in names if name.startswith("checkpoints/") and not name.endswith("-final.pt")}
    suggestion = folder / "suggested-k.json"
    number = without_seconds(json.loads(suggestion.read_text())) if suggestion.is_file() else None
    page = (folder / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>")
    return {**results(folder), "names": sorted(names), "suggested-k.json": number, "report.html is whole": page}


def survive(words: Sequence[object], fault: Fault, expected: dict[str, Any], log: Path) -> str:
    """Run a command on a new folder with a fault, and then without; check that it ends as if nothing had been.

    Returns:
        What :func:`check_end` returns.
    """
    folder = Path(fault.folder)
    end = check_end(fault, Process(*words, log=log, death=fault).result(600))
    again = Process(*words, log=log).result(600)
    assert again.code == 0, (fault, again.err)
    assert leftovers(folder) == [], fault
    found = state(folder)
    different = sorted(key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key))
    assert not different, (fault, different)
    return end
