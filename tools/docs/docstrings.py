"""Docstrings as Markdown: the sections of Google's style, and the fields that they describe."""

from __future__ import annotations

import inspect
import logging
import re
from pathlib import Path
from typing import Any

import griffe

ROOT = Path(__file__).resolve().parents[2]

logging.getLogger("griffe").setLevel(logging.ERROR)  # Types are in the signatures, not in the docstrings.

_ROLE = re.compile(r":[a-z]+:`[~.]*([^`]+)`")


def markdown(text: str) -> str:
    """Turn the markup of docstrings into Markdown: roles such as ``:func:`` and double backticks."""
    return _ROLE.sub(r"`\1`", text).replace("``", "`").strip()


def one_line(text: str) -> str:
    """Return a sentence as Markdown for a list or the cell of a table."""
    text = " ".join(markdown(text).split()).replace("|", "\\|")
    return text[:1].upper() + text[1:]


def sections(documented: Any) -> list[griffe.DocstringSection]:
    """Return the sections of the docstring of a class or function, in their order."""
    return griffe.Docstring(inspect.getdoc(documented) or "").parse("google")


def entries(section: griffe.DocstringSection) -> list[tuple[str, str]]:
    """Return the name or names ("mean, std") and the description of each entry of a section."""
    found = []
    for entry in section.value:
        name = getattr(entry, "name", "") or ""
        if name.endswith(","):  # griffe takes what follows the first blank for a type
            name = f"{name} {entry.annotation}"
        found.append((name or str(entry.annotation or ""), entry.description))
    return found


def prose(documented: Any) -> str:
    """Return the text of a docstring outside its sections, as Markdown."""
    parts = [section.value for section in sections(documented) if section.kind is griffe.DocstringSectionKind.text]
    return markdown("\n\n".join(parts))
