"""Completion of the command line in bash, zsh and fish: static scripts, made from the parser.

A script holds all words, so that completing one does not start Python, which would load torch.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .parsing import Parser

BASH = """\
# Completion of scan-fast for bash.
_scan_fast() {
    local current=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command=${COMP_WORDS[1]}
    local options= values= names= keys= files=
    if (( COMP_CWORD == 1 )); then
        mapfile -t COMPREPLY < <(compgen -W @COMMANDS@ -- "$current")
        return
    fi
    case $command in
@CASES@
    esac
    case " $values " in
        *" $previous "*) options= names= keys= files=1 ;;
    esac
    case "$command $previous" in
@CHOICES@
    esac
    if [[ $current == -* ]]; then
        mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
        return
    fi
    [[ -n $current ]] || keys=
    mapfile -t COMPREPLY < <(
        compgen -W "$names $keys" -- "$current"
        [[ -z $files ]] || compgen -f -- "$current"
    )
    compopt -o filenames 2> /dev/null
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -F _scan_fast scan-fast
"""

ZSH = """\
#compdef scan-fast
# Completion of scan-fast for zsh.
_scan_fast() {
    local -a commands options values names keys
    local files=
    commands=(@COMMANDS@)
    if (( CURRENT == 2 )); then
        _describe command commands
        return
    fi
    case $words[2] in
@CASES@
    esac
    case "$words[2] $words[CURRENT-1]" in
@CHOICES@
    esac
    if (( $values[(Ie)$words[CURRENT-1]] )); then
        _files
        return
    fi
    if [[ $words[CURRENT] == -* ]]; then
        _describe option options
        return
    fi
    (( $#names )) && compadd -a names
    [[ -n $words[CURRENT] ]] && (( $#keys )) && compadd -S '' -a keys
    [[ -z $files ]] || _files
}
if [[ $funcstack[1] == _scan_fast ]]; then
    _scan_fast "$@"
else
    compdef _scan_fast scan-fast
fi
"""


@dataclass(frozen=True)
class _Option:
    """An option of a command, with all of its names."""

    names: list[str]
    text: str
    takes_value: bool
    choices: list[str]


@dataclass(frozen=True)
class _Command:
    """The words of a command."""

    name: str
    text: str
    options: list[_Option]
    names: list[str]
    keys: list[str]
    files: bool


def script(shell: str, parser: Parser, configurations: Sequence[str], keys: Sequence[str]) -> str:
    """Return the script for a shell.

    Args:
        shell: one of :data:`SHELLS`.
        parser: the parser of all commands.
        configurations: names of configurations, for the commands that take one.
        keys: dotted keys of the configuration, for the same commands.
    """
    commands = []
    for name, sub in parser.subparsers.items():
        seen: dict[int, _Option] = {}
        for action in sub.options.values():
            choices = [str(choice) for choice in action.choices or ()]
            option = _Option(list(action.option_strings), _text(action), action.nargs != 0, choices)
            seen.setdefault(id(action), option)
        fixed = [str(choice) for action in sub.positionals for choice in action.choices or ()]
        known = list(configurations) if sub.takes_overrides else fixed
        own_keys = [f"{key}=" for key in keys] if sub.takes_overrides else []
        files = bool(sub.positionals) and not fixed
        commands.append(_Command(name, _plain(sub.description or ""), list(seen.values()), known, own_keys, files))
    return SHELLS[shell](commands)


def _text(action: argparse.Action) -> str:
    return _plain((action.help or "") % vars(action))


def _plain(text: str) -> str:
    """Return the first clause of a help text, without what shells read as marks."""
    return text.partition(";")[0].translate(str.maketrans("", "", "`'\"[]:\\")).strip()


def _bash(commands: list[_Command]) -> str:
    cases, choices = [], []
    for command in commands:
        options = " ".join(name for option in command.options for name in option.names)
        values = " ".join(name for option in command.options if option.takes_value for name in option.names)
        cases.append(
            f"        {command.name}) options={shlex.quote(options)} values={shlex.quote(values)}"
            f" names={shlex.quote(' '.join(command.names))} keys={shlex.quote(' '.join(command.keys))}"
            f" files={'1' * command.files} ;;"
        )
        choices += [
            f'        "{command.name} {name}") mapfile -t COMPREPLY < '
            f'<(compgen -W {shlex.quote(" ".join(option.choices))} -- "$current"); return ;;'
            for option in command.options
            for name in option.names
            if option.choices
        ]
    names = shlex.quote(" ".join(command.name for command in commands))
    return _filled(BASH, names, cases, choices)


def _zsh(commands: list[_Command]) -> str:
    cases, choices = [], []
    for command in commands:
        options = [shlex.quote(f"{name}:{option.text}") for option in command.options for name in option.names]
        values = [name for option in command.options if option.takes_value for name in option.names]
        cases.append(
            f"        {command.name}) options=({' '.join(options)}) values=({' '.join(values)})"
            f" names=({' '.join(command.names)}) keys=({' '.join(map(shlex.quote, command.keys))})"
            f" files={'1' * command.files} ;;"
        )
        choices += [
            f'        "{command.name} {name}") compadd {" ".join(option.choices)}; return ;;'
            for option in command.options
            for name in option.names
            if option.choices
        ]
    names = " ".join(shlex.quote(f"{command.name}:{command.text}") for command in commands)
    return _filled(ZSH, names, cases, choices)


def _filled(template: str, commands: str, cases: list[str], choices: list[str]) -> str:
    filled = template.replace("@CASES@", "\n".join(cases)).replace("@CHOICES@", "\n".join(choices))
    return filled.replace("@COMMANDS@", commands)


def _fish(commands: list[_Command]) -> str:
    lines = ["# Completion of scan-fast for fish.", "complete -c scan-fast -f"]
    for command in commands:
        text = shlex.quote(command.text)
        lines.append(f"complete -c scan-fast -n __fish_use_subcommand -a {command.name} -d {text}")
        here = f"complete -c scan-fast -n '__fish_seen_subcommand_from {command.name}'"
        if command.files:
            lines.append(f"{here} -F")
        if words := [*command.names, *command.keys]:
            lines.append(f"{here} -a {shlex.quote(' '.join(words))}")
        for option in command.options:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            value = ""
            if option.choices:
                value = f" -x -a {shlex.quote(' '.join(option.choices))}"
            elif option.takes_value:
                value = " -r -F"
            lines.append(f"{here} {names}{value} -d {shlex.quote(option.text)}")
    return "\n".join(lines) + "\n"


SHELLS: dict[str, Callable[[list[_Command]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
"""Makes the script of each shell."""
