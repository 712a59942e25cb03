"""The names that a user gives to the groups of a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

from ..errors import UsageError
from ..text import shown
from .reading import load_json
from .records import dump_json

LONGEST_NAME = 80


@dataclass(frozen=True)
class GroupNames:
    """Names of groups, with the grouping that they were given to.

    Attributes:
        assignments: the digest of the assignments; a name says nothing about another grouping.
        names: the name of each named group.
    """

    assignments: str
    names: dict[int, str] = field(default_factory=dict)

    def dump(self, file: BinaryIO) -> None:
        """Write JSON."""
        names = {str(group): name for group, name in sorted(self.names.items())}
        dump_json({"assignments": self.assignments, "names": names}, file)

    @classmethod
    def load(cls, file: BinaryIO) -> GroupNames:
        """Read what :meth:`dump` wrote.

        Raises:
            ValueError: for anything else.
        """
        content = load_json(file)
        digest, names = content.get("assignments"), content.get("names")
        if not isinstance(digest, str) or not isinstance(names, dict):
            raise ValueError("it must hold assignments and names")
        return cls(digest, {int(group): check_name(str(name)) for group, name in names.items()})


def check_name(name: str) -> str:
    """Return a name of a group without blanks around it.

    Raises:
        UsageError: for an empty or overlong name, or one with control characters.
    """
    name = name.strip()
    if not name or len(name) > LONGEST_NAME:
        raise UsageError(f"the name of a group must have 1 to {LONGEST_NAME} characters, got {len(name)}")
    if name != shown(name):
        raise UsageError(f"the name of a group must be one line of text, got {name!r}")
    return name


def parse_names(words: list[str], n_groups: int) -> dict[int, str]:
    """Read pairs of a group and its name: ``["3", "dogs", "4", "cats"]``.

    Raises:
        UsageError: for a missing name, or a group that does not exist.
    """
    if not words or len(words) % 2:
        raise UsageError('give pairs of a group and its name, such as 3 "dogs" 4 "cats"')
    return {parse_group(group, n_groups): check_name(name) for group, name in zip(words[::2], words[1::2], strict=True)}


def parse_group(text: str, n_groups: int) -> int:
    """Read the number of a group, with or without ``#``.

    Raises:
        UsageError: for anything else.
    """
    digits = text.removeprefix("#")
    # Python refuses to read numbers of thousands of digits.
    if not re.fullmatch("[0-9]{1,18}", digits) or int(digits) >= n_groups:
        raise UsageError(f"a group is a number from 0 to {n_groups - 1}, got {text[:40]!r}")
    return int(digits)


def title(group: int, names: Mapping[int, str]) -> str:
    """Return a group's name, or ``group 3``."""
    return names.get(group, f"group {group}")
