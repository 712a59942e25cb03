"""Parsing of a command line that takes no abbreviations and suggests what a mistyped word may have meant."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from .text import shown

EXIT_USAGE = 2

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")
"""Start of a ``section.key=value`` word."""

_KEY = re.compile(r"[A-Za-z_]\w*(\.\w+)+$")
_NUMBER = re.compile(r"-\.?\d")


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return ``: did you mean NAME?`` for the known name that is nearest to a word, or nothing if none is near."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6) or sorted(
        (name for name in names if word.strip("-") and name.startswith(word)), key=len
    )
    return f": did you mean {near[0]}?" if near else ""


class Parser(argparse.ArgumentParser):
    """A parser of commands.

    An option is known by its full name only: a later version may have another option with the same beginning. An error
    is one line with exit code 2.
    """

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def error(self, message: str) -> NoReturn:
        """Print one line that names the help of this command, and exit."""
        self.exit(EXIT_USAGE, shown(f"scan-fast: {message} (see {self.prog} --help)") + "\n")

    @property
    def subparsers(self) -> dict[str, Parser]:
        """The parser of each command, by name."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    @property
    def options(self) -> dict[str, argparse.Action]:
        """The action of each option, by each of its names, such as ``--help`` and ``-h``."""
        return dict(self._option_string_actions)

    @property
    def positionals(self) -> list[argparse.Action]:
        """The actions of the words that are no options."""
        return [action for action in self._get_positional_actions() if not _is_choice_of_commands(action)]

    @property
    def takes_overrides(self) -> bool:
        """True if ``section.key=value`` words may follow."""
        return self.get_default("overrides") is not None

    def chosen(self, words: Sequence[str]) -> Parser | None:
        """Return the parser of the command that the words name, None if they name none."""
        return self.subparsers.get(next((word for word in words if not word.startswith("-")), ""))

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse words; an unknown command, option or word ends the program with a suggestion."""
        words = list(args or ())
        self._check_words(words)
        options, rest = self.parse_known_args(words, namespace)
        if rest:
            (self.chosen(words) or self)._refuse(rest[0])
        return options

    def _check_words(self, words: Sequence[str]) -> None:
        """Refuse unknown commands and options before a missing word is reported, which may be due to them."""
        command = next((word for word in words if not word.startswith("-")), None)
        if command is None:
            _check_options(self, words)
            if not any(word in self.options for word in words):
                self.error(f"give a command, such as {next(iter(self.subparsers))}")
            return
        at = words.index(command)
        _check_options(self, words[:at])
        chosen = self.subparsers.get(command)
        if chosen is None:
            self.error(f"there is no command {command!r}{suggestion(command, self.subparsers)}")
        # What follows the name of a benchmark is for the benchmark.
        if not any(action.nargs == argparse.REMAINDER for action in chosen.positionals):
            _check_options(chosen, words[at + 1 :])

    def _refuse(self, word: str) -> NoReturn:
        if OVERRIDE.match(word) and self.takes_overrides:
            self.error(f"{word} goes with --config")
        if OVERRIDE.match(word):
            self.error(f"{self.prog.rpartition(' ')[2]} takes no configuration values, got {word}")
        if self.takes_overrides and _KEY.match(word):
            self.error(f"{word} has no value; give {word}=VALUE")
        self.error(f"one word too many: {word!r}")


def _check_options(parser: Parser, words: Sequence[str]) -> None:
    for word in words:
        if word == "--":
            return
        name = word.partition("=")[0]
        if not word.startswith("-") or word == "-" or " " in word or _NUMBER.match(word) or name in parser.options:
            continue
        hint = suggestion(name, parser.options)
        if not hint and parser.takes_overrides:
            hint = f"; values of the configuration have no dashes, such as {name.lstrip('-')}=VALUE"
        parser.error(f"there is no option {name}{hint}")


def split_overrides(arguments: Sequence[str], parser: Parser) -> tuple[list[str], list[str]]:
    """Take the ``section.key=value`` words out of a command line: they may stand anywhere among the options.

    Args:
        arguments: all words.
        parser: the parser of all commands.

    Returns:
        The other words, and the ``section.key=value`` words. A command that takes none keeps all of its words, and so
        does one with the option ``--config`` if that is not given.
    """
    chosen = parser.chosen(arguments)
    if chosen is None or not chosen.takes_overrides:
        return list(arguments), []
    if "--config" in chosen.options and not any(word.partition("=")[0] == "--config" for word in arguments):
        return list(arguments), []  # without a configuration, a=b.png is a file
    takes_value = {name for name, action in chosen.options.items() if action.nargs != 0}
    rest: list[str] = []
    overrides: list[str] = []
    for word in arguments:
        is_value = bool(rest) and rest[-1] in takes_value
        (overrides if OVERRIDE.match(word) and not is_value else rest).append(word)
    return rest, overrides


def _is_choice_of_commands(action: argparse.Action) -> bool:
    return isinstance(action, argparse._SubParsersAction)
