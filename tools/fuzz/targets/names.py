"""Names of files and groups: any bytes that a folder can hold, through listings, tables and the report's data."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from scan_fast.data.folders import held_out_rows, list_folder
from scan_fast.errors import DataError, ScanFastError, UsageError
from scan_fast.report.pagedata import as_script, folder_url, for_script
from scan_fast.runs.names import GroupNames, check_name, parse_group, parse_names
from scan_fast.runs.tables import Assignments, Skipped

from ..mutations import TEXTS, WHOLE, bytes_like
from ..target import Target, WrongResult

_PARTS = (
    "a", "é", "e\u0301", "日本", "\u202e", "\u2028", "\u200b", "\r", "\n", "\t", "\x1b[31m", "\x07", '"', "'", ",", ";",
    "=1+1", "+1", "-1", "@a", "--help",
    "<b>", "&amp;", "</script>", "%2e", "%", "#", "?", "\\", ":", "*", "|", " ", "..", "...", "~", "$HOME", "`a`",
    "{a,b}", "[0]", "//", "\ud800", "\udcff",
    "\U0001f600", "\x7f", "\x9b", "NUL", "con.png", "x" * 100,
)  # fmt: skip


def file_name(rng: Random) -> bytes:
    """Return a name that a folder can hold, often that of an image."""
    if rng.random() < 0.3:
        name = bytes_like(rng, rng.randrange(1, 30))
    else:
        text = "".join(rng.choice(_PARTS) for _ in range(rng.randrange(1, 4)))
        name = text.encode("utf-8", "surrogateescape" if "\ud800" not in text else "surrogatepass")
    name = name.replace(b"\0", b"").replace(b"/", b"_")[:200]
    if rng.random() < 0.9:
        name += rng.choice((b".png", b".jpg", b".PNG", b".JpEg", b".webp"))
    return name if name not in (b"", b".", b"..") else b"a.png"


class FileNames(Target):
    """A folder of files with such names."""

    name = "file-names"
    share = 30
    permitted = (DataError,)

    def draw(self, rng: Random) -> Any:
        """Return names of files and of the folders that hold them."""
        files = sorted({(rng.choice((b"", b"", file_name(rng))), file_name(rng)) for _ in range(rng.randrange(1, 7))})
        return files, rng.random()

    def feed(self, given: Any, folder: Path) -> None:
        """List the folder; write and read the tables of its images."""
        files, fraction = given
        made = set()
        for parent, name in files:
            place = os.path.join(os.fsencode(folder), parent)
            try:
                os.makedirs(place, exist_ok=True)
                os.close(os.open(os.path.join(place, name), os.O_CREAT | os.O_WRONLY, 0o600))
            except (FileExistsError, NotADirectoryError, IsADirectoryError):  # a file and a folder of one name
                continue
            made.add(os.path.join(parent, name))
        listing = list_folder(folder)
        names = listing.files
        listed = {os.fsencode(name) for name in names}
        if not listed <= made or len(listed) != len(names):
            raise WrongResult(f"listed {sorted(listed - made)}, which do not exist, or one twice")
        train, test = held_out_rows(names, fraction)
        if sorted([*train, *test]) != list(range(len(names))):
            raise WrongResult(f"of {len(names)} images {train} are trained on and {test} held out")
        check_tables(names, listing.class_names)
        for name in names:
            folder_url(os.path.join(folder, os.path.dirname(name)), str(folder)).encode("ascii")


def check_tables(names: list[str], classes: list[str] | None) -> None:
    """Write names to every table and read them again.

    Raises:
        WrongResult: if other names are read, or a script could end early.
    """
    n = len(names)
    numbers = np.arange(n)
    labels = [(classes or [""])[number % len(classes or [""])] for number in range(n)]
    table = Assignments(names, numbers, numbers / n, numbers / n, ["train"] * n, labels)
    file = io.BytesIO()
    table.dump(file)
    again = Assignments.load(io.BytesIO(file.getvalue()))
    if list(again.paths) != list(names) or again.digest != table.digest:
        raise WrongResult(f"the names are others after they were written: {names} {again.paths}")
    rows = list(csv.reader(io.StringIO(table.to_csv(), newline="")))
    if len(rows) != n + 1 or len({len(row) for row in rows}) != 1:
        raise WrongResult(f"the table of {n} images has {len(rows)} rows")
    file = io.BytesIO()
    Skipped([(name, name) for name in names]).dump(file)
    if len(Skipped.load(io.BytesIO(file.getvalue())).images) != n:
        raise WrongResult(f"of {n} images that were left out not all are listed")
    data = {"name": names, "labels": labels}
    text, script = for_script(data), as_script(data)
    if json.loads(text) != data or any(mark in text + script for mark in "<>&\u2028\u2029"):
        raise WrongResult(f"the page's data is not safe in a script: {text}")


class GroupWords(Target):
    """Words that name groups."""

    name = "group-names"
    share = 25
    permitted = (UsageError,)

    def draw(self, rng: Random) -> Any:
        """Return words as a command line has them."""
        words = [
            str(rng.choice((0, 1, 2, 3, "#1", "#", *WHOLE, *TEXTS))) if i % 2 == 0 else self._name(rng)
            for i in range(rng.randrange(6))
        ]
        return [word.replace("\0", "") for word in words]

    @staticmethod
    def _name(rng: Random) -> str:
        return "".join(rng.choice((*_PARTS, *TEXTS)) for _ in range(rng.randrange(3)))

    def feed(self, given: Any, folder: Path) -> None:
        """Read the words; write and read the names."""
        error: ScanFastError | None = None
        for word in given:
            try:
                check_name(word)
                parse_group(word, 3)
            except UsageError as refused:
                error = refused
        names = GroupNames("0" * 32, parse_names(given, 3))
        file = io.BytesIO()
        names.dump(file)
        if GroupNames.load(io.BytesIO(file.getvalue())) != names:
            raise WrongResult(f"other names were read than {names}")
        check_tables([f"{name}.png" for name in names.names.values()], None)
        if error is not None and not names.names:
            raise error
