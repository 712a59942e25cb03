"""A target of fuzzing: how inputs are made, what reads them, and which errors it may raise."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from scan_fast.errors import ScanFastError


class WrongResult(AssertionError):
    """An input was accepted, but the result contradicts what the code promises."""


class Target(ABC):
    """Makes inputs and feeds them to a part of the package.

    The input of a number is the same on each call, whatever was made before, so that a finding can be repeated.

    Args:
        shared: a folder that is made once for all processes and is not written to afterwards.

    Attributes:
        name: of the target on the command line.
        share: inputs of a thousand that it gets if all targets run.
        permitted: the errors that a bad input may raise.
        memory_mib: resident memory in MiB that one input may take in addition.
        seconds: processor time that one input may take.
        batch: inputs of one process.
    """

    name: ClassVar[str]
    share: ClassVar[int]
    permitted: ClassVar[tuple[type[BaseException], ...]] = (ScanFastError, OSError)
    memory_mib: ClassVar[int] = 256
    seconds: ClassVar[int] = 10
    batch: ClassVar[int] = 500

    def __init__(self, shared: Path) -> None:
        self.shared = shared

    def make(self, seed: int, index: int) -> Any:
        """Return the input of a number."""
        return self.draw(Random(f"{self.name}/{seed}/{index}"))

    @abstractmethod
    def draw(self, rng: Random) -> Any:
        """Return an input that depends on nothing but the generator."""

    @abstractmethod
    def feed(self, given: Any, folder: Path) -> None:
        """Read an input.

        Args:
            given: what :meth:`make` returned.
            folder: an empty folder for files, which is the working directory; nothing else may be written.

        Raises:
            WrongResult: if the input is accepted with a result that cannot be right.
            BaseException: one of ``permitted`` if it is refused; anything else is a finding.
        """


def write(folder: Path, name: str, data: bytes) -> Path:
    """Write a file of an input and return its path."""
    path = folder / name
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        while data:
            data = data[os.write(handle, data) :]
    finally:
        os.close(handle)
    return path


def empty(folder: Path) -> None:
    """Remove what is in a folder."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            empty(Path(entry.path))
            os.rmdir(entry.path)
        else:
            os.unlink(entry.path)
