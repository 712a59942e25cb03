"""Comparison of every file of a run with its digest, and digests for files that are right without one."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..atomic import atomic_file
from ..errors import RunError
from . import artifacts
from .artifacts import Artifact
from .digests import DamagedError, UnsealedError, check_seal, is_archive, seal, unsealed
from .folder import RunFolder


def present(run: RunFolder) -> list[Artifact[Any]]:
    """Return the files that a run has, in the order of their names."""
    former = (artifacts.former_names(number) for number in range(1, 1 + len(list(run.path.glob("names-former-*")))))
    return sorted((each for each in (*artifacts.all_artifacts(), *former) if run.has(each)), key=lambda each: each.name)


def problems(run: RunFolder) -> Iterator[tuple[Artifact[Any], str]]:
    """Yield every file of a run that does not have the digest that it was written with, and why with what to do.

    Raises:
        OSError: if a file cannot be read.
    """
    for artifact in present(run):
        try:
            run.check(artifact)
        except RunError as error:
            yield artifact, str(error)


def accept(run: RunFolder) -> list[str]:
    """Give digests to files that have none, or were changed on purpose; return their names.

    Nothing is changed but the digests. The folder must be locked.

    Raises:
        RunError: if a file cannot be read at all. Files before it have their digest by then.
        OSError: if a file cannot be read or written.
    """
    accepted = []
    for artifact in present(run):
        path = run.path_of(artifact)
        try:
            run.check(artifact)
        except RunError:
            _accept(artifact, path, run)
            accepted.append(artifact.name)
    return accepted


def accept_file(path: Path) -> bool:
    """Give a model.pt outside of a run folder a digest; return False if it has one that is right.

    Raises:
        WeightsError: if it cannot be read at all.
        OSError: if it cannot be read or written.
    """
    with path.open("rb") as file:
        try:
            check_seal(file)
            return False
        except (DamagedError, UnsealedError):
            pass
    _accept(artifacts.MODEL, path, None)
    return True


def _accept(artifact: Artifact[Any], path: Path, run: RunFolder | None) -> None:
    content = path.read_bytes()
    if is_archive(artifact.name):
        buffer = io.BytesIO(unsealed(content))
        try:
            seal(buffer)
            buffer.seek(0)
            artifact.load(buffer)
        except ValueError as error:
            raise artifact.error(f"{path} cannot be read: {' '.join(str(error).split())}") from error
        with atomic_file(path) as file:
            file.write(buffer.getbuffer())
        return
    assert run is not None
    artifacts.read(artifact, path)
    artifacts.enter(artifact, content, path, run.journal)
