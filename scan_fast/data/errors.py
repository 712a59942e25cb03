"""The error that every problem with the user's images becomes."""

from __future__ import annotations


class DataError(ValueError):
    """The images cannot be used as given; the message names the folder, file or array and says what would be right."""
