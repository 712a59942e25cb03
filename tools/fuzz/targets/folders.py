"""Whole commands on a finished run of which files were changed: what a damaged or foreign run folder can do."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import shutil
from pathlib import Path
from random import Random
from typing import Any

from scan_fast import cli
from scan_fast.errors import ScanFastError
from scan_fast.parsing import split_overrides
from scan_fast.runs.artifacts import METRICS
from scan_fast.runs.digests import Journal, digest_of, is_archive

from ..archives import ZIP_TOKENS, change_npy, change_pickle, change_zip, read_zip, sealed, write_zip
from ..mutations import as_json, change_table, change_tree, mutate
from ..pictures import pictures
from ..small_run import small_run
from ..target import Target, WrongResult, write
from .names import file_name

_COMMANDS = (
    "report RUN", "report RUN --single-file", "predict RUN --data images", "predict RUN --data images --out a.csv",
    "evaluate RUN --json",
    "evaluate RUN --data images", "compare RUN --json", "name RUN 0 boots", "name RUN --list", "name RUN --clear",
    "folders RUN --out groups",
    "embed RUN --data images --out a.npz", "export RUN --format reference --out a.pth.tar",
    "export RUN --format reference --stage mining --out a",
    "config RUN", "probe RUN --json", "evaluate RUN --data images --prototypes a.png",
    "predict RUN --data images --on-error skip",
)  # fmt: skip

_MODULES = ("matplotlib.font_manager", *(f"scan_fast.{name}" for name in (
    "evaluating", "probing", "predictor", "applying", "report.build", "report.folders", "reference_export",
    "runs.comparison", "training.context",
)))  # fmt: skip
"""Commands import these when they need them; here once for all processes."""


class Commands(Target):
    """A command on a copy of a finished run with one or two changed files or images."""

    name = "run-folders"
    share = 2
    batch = 60
    seconds = 20
    memory_mib = 700
    permitted = (ScanFastError, OSError)

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._run = small_run(shared)
        for name in _MODULES:
            importlib.import_module(name)
        self._files = {
            path.relative_to(self._run).as_posix(): path.read_bytes()
            for path in sorted(self._run.rglob("*"))
            if path.is_file() and path.name != ".lock" and not path.name.startswith("report")
        }
        for name, data in self._files.items():
            if name.endswith(".npz"):
                self._files[name] = write_zip(read_zip(data))

    def draw(self, rng: Random) -> Any:
        """Return a command, changed files by name, names of images, and whether the digests fit the changed files."""
        changed = {}
        for _ in range(rng.choice((1, 1, 1, 2))):
            name = rng.choice(list(self._files))
            changed[name] = None if rng.random() < 0.1 else self._changed(rng, name, self._files[name])
        images = {file_name(rng): rng.choice(list(pictures())) for _ in range(rng.choice((0, 0, 1, 3)))}
        return rng.choice(_COMMANDS).split(), changed, images, rng.random() < 0.85

    def _changed(self, rng: Random, name: str, data: bytes) -> bytes:
        if rng.random() < 0.2:
            return mutate(rng, data, list(self._files.values()))
        if name.endswith(".json"):
            return as_json(change_tree(rng, json.loads(data)))
        if name.endswith(".csv"):
            rows = change_table(rng, [line.split(",") for line in data.decode().splitlines()])
            return "\n".join(map(",".join, rows)).encode("utf-8", "surrogatepass")
        if name.endswith(".npz"):
            return change_zip(rng, read_zip(data), lambda _, content: change_npy(rng, content))
        if name.endswith(".pt"):
            return change_zip(
                rng,
                read_zip(data),
                lambda at, content: (change_pickle if at.endswith(".pkl") else mutate)(rng, content),
            )
        return mutate(rng, data, (), ZIP_TOKENS)

    def feed(self, given: Any, folder: Path) -> None:
        """Copy the run, change its files, carry out the command."""
        words, changed, images, with_digests = given
        run = folder / "run"
        shutil.copytree(self._run, run)
        for name, data in changed.items():
            os.unlink(run / name)
            if data is not None and with_digests:
                write(run, name, _with_digest(run, name, data))
            elif data is not None:
                write(run, name, data)
        (folder / "images").mkdir()
        found = pictures()
        write(folder, "images/a.png", found["plain.png"])
        for name, picture in images.items():
            write(folder / "images", os.fsdecode(name), found[picture])
        words = [str(run) if word == "RUN" else word for word in words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            parser = cli.build_parser()
            rest, overrides = split_overrides(words, parser)
            try:
                options = parser.parse_args(rest)
                options.overrides = overrides
                code = options.run(options)
            except SystemExit as stop:
                raise ScanFastError("refused by the parser") from stop
        if code != 0:
            raise WrongResult(f"the command returned {code}")


def _with_digest(run: Path, name: str, data: bytes) -> bytes:
    """Return what to write as a file of the run, so that its digest is right."""
    if is_archive(name):
        return sealed(data)
    journal = Journal(run)
    for part in (data, *(data.split(b"\n") if name == METRICS.name else ())):
        journal.add(name, digest_of(part))
    return data
