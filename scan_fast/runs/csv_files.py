"""The form of CSV files: cells that no spreadsheet takes for formulas, and rows that end in a line feed."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

from ..text import restored, written


class _Writer(Protocol):
    def writerow(self, row: Iterable[Any], /) -> Any: ...
    def writerows(self, rows: Iterable[Iterable[Any]], /) -> None: ...


_FORMULA = "[=+\\-@\uff1d\uff0b\uff0d\uff20]"
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")
_PATH_LIKE_FORMULA = re.compile(rf"(\./)*{_FORMULA}")
_TEXT_LIKE_FORMULA = re.compile(rf"'*{_FORMULA}")


def path_cell(path: str) -> str:
    """Return the cell of a CSV that holds the name of an image; :func:`path_of` reads it.

    A spreadsheet takes a cell that begins with ``=``, ``+``, ``-`` or ``@`` for a formula, which may start programs.
    Such a name begins with ``./`` in the table: it names the same file for any program that reads the table, which an
    apostrophe would not. Characters that would break the line, and bytes that are no UTF-8, are escaped as
    :func:`..text.written` does, so that no two names become one.
    """
    cell = written(path)
    return f"./{cell}" if _PATH_LIKE_FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def path_of(cell: str) -> str:
    """Return the name of which :func:`path_cell` made this cell."""
    return restored(cell[2:] if cell.startswith("./") and _PATH_LIKE_FORMULA.match(cell) else cell)


def text_cell(text: str) -> str:
    """Return the cell of a CSV that holds any other text, such as a class; :func:`text_of` reads it.

    What a spreadsheet would take for a formula begins with an apostrophe, which spreadsheets leave out again.
    """
    cell = written(text)
    return f"'{cell}" if _TEXT_LIKE_FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def text_of(cell: str) -> str:
    """Return the text of which :func:`text_cell` made this cell."""
    return restored(cell[1:] if cell.startswith("'") and _TEXT_LIKE_FORMULA.match(cell) else cell)


class _LineFeeds:
    """Ends rows in a line feed. The csv module quotes a carriage return only if its line terminator has one."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._text = text

    def write(self, row: str) -> int:
        return self._text.write(row.removesuffix("\r\n") + "\n")


@contextmanager
def csv_writer(file: BinaryIO) -> Iterator[_Writer]:
    """Write rows as CSV, each ended by a line feed, without closing the file below."""
    with as_text(file) as text:
        yield csv.writer(_LineFeeds(text), lineterminator="\r\n")


@contextmanager
def as_text(file: BinaryIO) -> Iterator[io.TextIOWrapper]:
    """Read or write text without closing the file below it.

    Raises:
        ValueError: for what is no CSV.
    """
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    try:
        yield text
        text.flush()
    except csv.Error as error:  # of a cell without end, or a zero byte
        raise ValueError(f"it is no CSV: {error}") from error
    finally:
        text.detach()
