"""Writing and reading of results. Standard library only."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

FOLDER = "FOLDER"
"""Stands in results for the folder of the images, which says something about one machine only."""


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write a JSON file beside its name and rename it, so that a reader never sees half of it.

    Args:
        path: the file; missing folders are made.
        content: plain values.
        indent: spaces per level; None for one line.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(json.dumps(content, indent=indent) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
