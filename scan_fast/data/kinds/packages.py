"""Optional packages that read images."""

from __future__ import annotations

import importlib
from typing import Any

from ...errors import MissingPackageError


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
