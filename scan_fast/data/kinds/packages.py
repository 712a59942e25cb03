"""Optional packages that read images."""

from __future__ import annotations

import importlib
import os
from typing import Any

from ...errors import MissingPackageError


def regular_file(path: str) -> str:
    """Return the path that a row of a table names, if it is that of a plain file.

    Raises:
        ValueError: if it is not: a device or a pipe may never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"the row names {path}, which is no plain file")
    return path


def optional_package(name: str, extra: str) -> Any:
    """Import a package that an extra installs.

    Raises:
        MissingPackageError: if it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise MissingPackageError(f"this source needs {package}: pip install 'scan-fast[{extra}]' ({error})") from error
