"""The cost of digests in a run: ``python -m benchmarks.digests``.

It runs the digits, and a folder of JPEG photographs that it makes, in this process. Every function that computes,
enters or compares a digest is timed: those of the run's files, and those of the images, which are computed in the
threads that read them. Their seconds, summed over threads, are compared with the seconds of the whole run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scan_fast.cli import main as command_line
from scan_fast.data import checking, files
from scan_fast.runs import artifacts
from scan_fast.runs.digests import Journal
from scan_fast.training import images

from .environment import describe
from .files import write_json
from .streaming import make_folder

TIMED: tuple[tuple[Any, str, str], ...] = (
    (artifacts, "seal", "files"),
    (artifacts, "check_seal", "files"),
    (artifacts, "digest_of", "files"),
    (Journal, "add", "files"),
    (Journal, "known", "files"),
    (Journal, "known_lines", "files"),
    (Journal, "shorten", "files"),
    (checking, "fingerprint", "images"),
    (files, "fingerprint", "images"),
    (images, "_pixel_digests", "images"),
)
"""Modules or classes with the name of a function that they call, and what its digests are of."""


class Timer:
    """Sums the seconds and calls of functions by what their digests are of; threads count each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {"files": 0.0, "images": 0.0}
        self.calls: dict[str, int] = {"files": 0, "images": 0}
        self._lock = threading.Lock()

    def timed(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        """Return the function, timed."""

        def call(*arguments: Any, **named: Any) -> Any:
            begin = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                seconds = time.perf_counter() - begin
                with self._lock:
                    self.seconds[what] += seconds
                    self.calls[what] += 1

        return call

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time the functions of :data:`TIMED` inside the block."""
        former = [(place, name, getattr(place, name)) for place, name, _ in TIMED]
        try:
            for place, name, what in TIMED:
                setattr(place, name, self.timed(getattr(place, name), what))
            yield
        finally:
            for place, name, function in former:
                setattr(place, name, function)


def measure(words: list[str]) -> dict[str, Any]:
    """Run a command and return its seconds, those of digests and their share.

    Raises:
        RuntimeError: if the command fails.
    """
    timer, output = Timer(), io.StringIO()
    begin = time.perf_counter()
    with timer.running(), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        code = command_line(words)
    seconds = time.perf_counter() - begin
    if code:
        raise RuntimeError(output.getvalue())
    return {
        "seconds": seconds,
        "digest_seconds": timer.seconds,
        "calls": timer.calls,
        "share": sum(timer.seconds.values()) / seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=int, default=1000, help="JPEG files of 1024 x 768 pixels in the folder")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "photographs"
        make_folder(folder, options.photographs, 1024, 768)
        size = sum(file.stat().st_size for file in folder.rglob("*.jpg")) / options.photographs
        runs = {
            "digits": ["run", "digits"],
            "photographs": ["run", "--data", str(folder), "--clusters", "10", "preset=descriptor"],
        }
        for name, words in runs.items():
            results[name] = measure([*words, "--quiet", "--out", str(Path(temporary) / f"run-{name}")])
            found = results[name]
            print(
                f"{name:<12} {found['seconds']:8.1f} s, digests of files {found['digest_seconds']['files']:.3f} s, of "
                f"images {found['digest_seconds']['images']:.3f} s: {found['share']:.2%}"
            )
    if options.json:
        settings = {"photographs": options.photographs, "bytes_per_photograph": round(size)}
        write_json(options.json, {"environment": describe("cpu"), "settings": settings, "results": results})


if __name__ == "__main__":
    main()
