"""The images that words such as ``--data`` name, checked before anything is opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError


def check_folder(data: str, option: str = "--data") -> None:
    """Refuse what is no folder of images and no PREFIX:ARGUMENT.

    Raises:
        UsageError: names the option and what was given.
    """
    from .data.kinds import is_prefixed

    if is_prefixed(data):
        return
    path = Path(data).expanduser()
    if path.is_file():
        raise UsageError(f"{option}: {data} is a file; give the folder that holds the images")
    if not path.is_dir():
        raise UsageError(f"{option}: there is no folder {data}")


def check_labelled(data: str, option: str = "--data") -> None:
    """Refuse what :func:`check_folder` refuses, and a folder whose sub-folders are splits, which would be classes.

    Raises:
        UsageError: names the option and what was given.
    """
    from .data.folders import TEST_NAMES, TRAIN_NAMES
    from .data.kinds import is_prefixed

    check_folder(data, option)
    if is_prefixed(data):
        return
    folder = Path(data).expanduser()
    found = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if found and all(name.lower() in (*TRAIN_NAMES, *TEST_NAMES) for name in found):
        raise UsageError(f"{option}: {folder} holds {', '.join(found)}; give one of them, such as {folder / found[-1]}")


def folder_or_files(words: Sequence[str]) -> str | list[str]:
    """Return what the words of --data name: a folder or PREFIX:ARGUMENT, or a list of files.

    Raises:
        UsageError: for several folders, folders among files, a file given twice, or what is not there.
    """
    from .data.kinds import is_prefixed

    if len(words) == 1 and (is_prefixed(words[0]) or Path(words[0]).expanduser().is_dir()):
        return words[0]
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir() or is_prefixed(word):
            raise UsageError(f"--data: give one folder or source, or files only; got {word} among {len(words)}")
        if not path.is_file():
            raise UsageError(f"--data: there is no file or folder {word}")
    repeated = {word for word in words if words.count(word) > 1}
    if repeated:
        raise UsageError(f"--data: each file must be given once, got {min(repeated)} again")
    return list(words)
