"""Measures everything that the documentation quotes: ``python -m tools.docs.record --device cpu [--data FOLDER]``.

One benchmark after the other runs in a separate process and writes ``benchmarks/results/<device>-<name>.json``, on a
processor without AMX ``cpu-<name>-avx512.json`` or ``cpu-<name>-avx2.json``; then :mod:`tools.docs.benchmarks` writes
the page. The machine should be idle otherwise. If a benchmark fails, the others
still run; its name is printed at the end, and the exit status is 1. ``--only`` repeats some of them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.environment import kind_of, result_file
from scan_fast.ops import native
from scan_fast.ops.families import FAMILIES

from . import benchmarks as pages

ROOT = Path(__file__).resolve().parents[2]
NAMES = (*FAMILIES, "views", "accuracy", "end_to_end", "targets")
CPU_ONLY = ("targets", *(family.name for family in FAMILIES.values() if family.portable is None))


def command(name: str, kind: str, results: Path, data: Path | None) -> list[str]:
    """Return the command that measures one of NAMES on a kind of device, see benchmarks/environment.py."""
    file, device = results / result_file(kind, name), kind.partition("-")[0]
    words = [sys.executable, "-m", f"benchmarks.{name}", "--device", device, "--json", str(file)]
    if name == "accuracy":
        words += ["--config", "digits", "--seeds", "0", "1", "2"]
    if name == "end_to_end" and data is not None:
        words += ["--data", str(data)]
    if name == "targets":
        words += ["--end-to-end", str(results / result_file(kind, "end_to_end"))]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.docs.record", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the images of the end-to-end benchmark")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="these alone")
    parser.add_argument("--results", type=Path, default=pages.RESULTS, help="where the files go")
    parser.add_argument("--page", type=Path, default=pages.PAGE, help="the page to write")
    options = parser.parse_args()
    results, data = options.results.resolve(), options.data.resolve() if options.data else None
    kind, failed = kind_of(options.device, native.build_info()), []
    for name in options.only:
        if name in CPU_ONLY and options.device != "cpu":
            continue
        print(f"\n==== {name}", flush=True)
        begin = time.monotonic()
        words = command(name, kind, results, data)
        if subprocess.run(words, cwd=ROOT, check=False).returncode:
            failed.append(name)
        print(f"==== {name}: {time.monotonic() - begin:.0f} s", flush=True)
    pages.write(results, options.page)
    print(f"\nwrote {options.page}")
    if failed:
        raise SystemExit(f"failed or missed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
