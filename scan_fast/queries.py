"""Commands that look at configurations and at finished runs. Each imports what it needs, as in :mod:`.commands`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .errors import UsageError
from .text import show


def compare(options: argparse.Namespace) -> int:
    """Print one table of several runs."""
    from .atomic import atomic_file
    from .runs.comparison import compare
    from .runs.folder import RunFolder
    from .runs.tracker import print_table

    if len(set(options.targets)) < len(options.targets):
        raise UsageError(f"each run must be given once, got {' '.join(options.targets)}")
    comparison = compare({name: RunFolder.existing(Path(name)) for name in options.targets})
    if options.csv is not None:
        with atomic_file(options.csv) as file:
            comparison.dump_csv(file)
    if options.json:
        print(json.dumps(comparison.to_dict(), indent=2))
        return 0
    print_table("results, on the test images of runs that have some", *comparison.table())
    if len(options.targets) > 1:
        print_table("agreement (AMI) on the images in both", *comparison.agreement_table())
    return 0


def check(options: argparse.Namespace) -> int:
    """Compare every file of a run, or a model.pt, with the digest that it was written with."""
    from .errors import RunError
    from .runs.artifacts import MODEL, read
    from .runs.folder import RunFolder
    from .runs.verification import accept, accept_file, present, problems

    target: Path = options.target
    if target.is_file():
        if options.accept and accept_file(target):
            show(f"{target} has a digest now")
        read(MODEL, target)
        show(f"{target} is as it was written")
        return 0
    run = RunFolder.existing(target)
    if options.accept:
        with run:
            for name in accept(run):
                show(f"{name} has a digest now")
    found = list(problems(run))
    for _, text in found:
        show(text)
    files = present(run)
    if found:
        names = ", ".join(artifact.name for artifact, _ in found)
        raise RunError(f"{len(found)} of {len(files)} files of {target} are not as they were written: {names}")
    show(f"{len(files)} files of {target} are as they were written")
    return 0


def list_configs() -> str:
    """Return the shipped configurations with their presets, and what each is for."""
    from .runs.config import shipped_configs

    entries = [(name, *_about_config(path)) for name, path in sorted(shipped_configs().items())]
    width = max((len(name) for name, *_ in entries), default=0)
    return "\n".join(f"{name:<{width}}  presets: {presets}\n{'':<{width}}  {about}" for name, presets, about in entries)


def _about_config(path: Path) -> tuple[str, str]:
    """Return the presets of a shipped configuration and the first sentence of its comment."""
    from .runs.config import presets_of

    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("# "))
    return ", ".join(presets_of(path)), " ".join(lines).partition(". ")[0]


def list_keys(pattern: str) -> str:
    """Return the keys of the configuration that a pattern selects, each with its type, default and meaning."""
    from .runs.keys import find_keys

    lines = []
    for key in find_keys(pattern):
        kind = f", of kind {key.kind}" if key.kind else ""
        lines += [f"{key.name} = {key.default}  ({key.type}{kind})", f"    {key.meaning}"]
    return "\n".join(lines)


def completion(options: argparse.Namespace) -> int:
    """Print a script that completes the command line in a shell."""
    from .completion import script
    from .runs.config import shipped_configs
    from .runs.keys import all_keys

    keys = list(dict.fromkeys(key.name for key in all_keys()))
    print(script(options.shell, options.parser, sorted(shipped_configs()), keys), end="")
    return 0
