"""Runs ``benchmarks.gpu_run`` with what was carried to a machine without network; run it as ``tools/gpu_run``.

Options are those of ``python -m benchmarks.gpu_run``, and ``--carried FOLDER``. The folder has what ``tools/gpu_build``
prepared: the compiled module, wheels of what the driver needs if pydantic is missing, and the archive of images.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Standard library only: the imports of the driver have to wait until what was carried is in place.
from . import carried

BEGIN = time.monotonic()
EXIT_USAGE = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Put everything in place and run; what is missing is one line and exit code 2."""
    parser = argparse.ArgumentParser(prog="tools/gpu_run", description=__doc__, add_help=False)
    parser.add_argument("--carried", type=Path, default=carried.FOLDER)
    options, others = parser.parse_known_args(arguments)
    try:
        take(options.carried)
        from benchmarks.gpu_run import run
    except (carried.CarriedError, ImportError) as error:
        print(f"gpu_run: {error}")
        return EXIT_USAGE
    return run.main(["--archive", str(options.carried / carried.ARCHIVE), *others], BEGIN)


def take(folder: Path) -> None:
    """Put the carried module and, if pydantic is missing, the carried wheels in place."""
    if importlib.util.find_spec("pydantic") is None:
        # Before everything else: the versions of the wheels were chosen together.
        sys.path.insert(0, str(carried.wheels(folder)))
        importlib.invalidate_caches()
    refusal = carried.use(folder)
    built = any((carried.ROOT / "scan_fast").glob(f"_C.{sys.implementation.cache_tag}*"))
    if refusal and not built:
        print(f"module: {refusal}; going on with plain PyTorch", flush=True)


if __name__ == "__main__":
    sys.exit(main())
