"""The record of the environment of a run: threads, versions and machine, on which its bits depend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO

from .reading import load_json
from .records import dump_json

Facts = Mapping[str, str | int]
"""The environment of a process: by a name in words, a version, a number of threads and so on."""

CHANGED = "environment_changed"
"""Key of a stage's entry in summary.json: the differences from the start of the run, ``name: then -> now`` each."""


@dataclass(frozen=True)
class EnvironmentRecord:
    """The environment that a run began in, and changes since.

    Attributes:
        facts: as the run began.
        changes: of the processes that have worked on the stage that is not finished.
    """

    facts: dict[str, str | int]
    changes: tuple[str, ...] = ()

    def changed(self, now: Facts) -> list[str]:
        """Return in words what is other than when the run began."""
        names = {**self.facts, **now}
        return [
            f"{name}: {self.facts.get(name, 'unknown')} -> {now.get(name, 'unknown')}"
            for name in names
            if self.facts.get(name) != now.get(name)
        ]

    def dump(self, file: BinaryIO) -> None:
        """Write JSON."""
        dump_json({"facts": self.facts, "changes": list(self.changes)}, file)

    @classmethod
    def load(cls, file: BinaryIO) -> EnvironmentRecord:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        content = load_json(file)
        facts, changes = content.get("facts"), content.get("changes")
        if not isinstance(facts, dict) or not all(isinstance(value, str | int) for value in facts.values()):
            raise ValueError("it must hold facts, each a text or a number")
        if not isinstance(changes, list) or not all(isinstance(change, str) for change in changes):
            raise ValueError("it must hold changes, a list of texts")
        return cls(facts, tuple(changes))
