"""Errors that a user can act on.

Each message names what was given and what would be right. The command line prints it as one line and exits with code 2.
Any other exception is a defect of the program, except for OSError and exhausted memory.
"""

from __future__ import annotations


class ScanFastError(Exception):
    """Base class of the errors that a user can act on."""


class ConfigError(ScanFastError, ValueError):
    """A configuration that cannot be used."""


class DataError(ScanFastError, ValueError):
    """Images that cannot be used as given; the message names the folder, file or array."""


class WeightsError(ScanFastError, ValueError):
    """Weights that do not fit a model, or a file that does not hold weights."""


class RunError(ScanFastError, RuntimeError):
    """A run folder that cannot be used, or a stage that cannot start."""


class UsageError(ScanFastError, ValueError):
    """A command, an option or a choice of kernels that is not possible here."""


class MissingPackageError(ScanFastError, ImportError):
    """An optional package that is not installed; the message says how to install it."""


class RankError(ScanFastError, RuntimeError):
    """Another process of the same run has failed, or cannot be reached."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its name if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)
