"""Reading of the plain contents of a run folder, which may come from elsewhere: JSON, arrays and tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from numpy.typing import NDArray

from ..array_files import read_npz
from ..models.tensor_files import read_tensors

DEEPEST = 40
"""Levels of values within values that a JSON file of a run may have."""


def load_json(file: BinaryIO) -> dict[str, Any]:
    """Read a mapping from JSON.

    Raises:
        ValueError: for anything else, or values that are nested deeper than :data:`DEEPEST`.
    """
    content = parse_json(file.read())
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a mapping, it holds {type(content).__name__}")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the values of a JSON text.

    Raises:
        ValueError: if it is none, its values are nested deeper than :data:`DEEPEST`, or a number is too large.
    """
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError(f"its values are nested deeper than {DEEPEST} levels") from error
    level, depth = [content], 0
    while level:
        # Such a number fits into no float and no array.
        if any(isinstance(value, int) and not -(1 << 63) <= value < 1 << 64 for value in level):
            raise ValueError("a whole number in it has more than 64 bits")
        level = [inner for value in level if isinstance(value, dict | list) for inner in _inside(value)]
        depth += bool(level)
        if depth > DEEPEST:
            raise ValueError(f"its values are nested deeper than {DEEPEST} levels")
    return content


def _inside(value: dict[str, Any] | list[Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def load_arrays(file: BinaryIO) -> dict[str, NDArray[Any]]:
    """Read the arrays of an .npz; no more memory is taken than :func:`..array_files.read_npz` permits.

    Raises:
        ValueError: if it is none.
    """
    try:
        return read_npz(file)
    except ValueError as error:
        raise ValueError(f"it is no .npz of arrays: {error}") from error


def load_tensors(file: BinaryIO) -> dict[str, Any]:
    """Read a mapping of tensors and plain values that torch.save wrote, onto the CPU.

    Raises:
        ValueError: for anything else.
    """
    try:
        content = read_tensors(file)
    except ValueError as error:
        raise ValueError(f"it is no file of tensors: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"it must hold a mapping, it holds {type(content).__name__}")
    return content


def listed(content: Mapping[Any, Any]) -> str:
    """Return the first names of a mapping, for errors."""
    return ", ".join(str(name)[:40] for name in list(content)[:12]) or "nothing"


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_count(value: Any, least: int = 0) -> bool:
    """Return whether a value is a whole number of 63 bits, not below ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63
