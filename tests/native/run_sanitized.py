"""Run Python tests on a module that was compiled with AddressSanitizer and UndefinedBehaviorSanitizer.

    python tests/native/run_sanitized.py BUILD [PYTEST ARGUMENT ...]

BUILD is the folder of the preset ``sanitize``. Python itself is not sanitized, so the sanitizer's runtime is loaded
before it. So is the C++ library: otherwise the runtime does not find the functions of exceptions, which it wraps, and
ends the process at the first exception of another module. pytest captures nothing, because a sanitizer reports and ends
the process at once. Leaks are not reported, because those of Python and PyTorch would be.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def link_package(build: Path) -> Path:
    """Put links to the package and to BUILD's module into one folder; return the folder for ``sys.path``."""
    module = build / "_C.so"
    if not module.is_file():
        raise SystemExit(f"{module} does not exist: build the preset sanitize first")
    folder = build / "package"
    package = folder / "scan_fast"
    package.mkdir(parents=True, exist_ok=True)
    for old in package.iterdir():
        old.unlink()
    for entry in (ROOT / "scan_fast").iterdir():
        if entry.name != "__pycache__" and entry.suffix != ".so":
            (package / entry.name).symlink_to(entry)
    (package / module.name).symlink_to(module)
    return folder


def libraries_to_preload(module: Path) -> str:
    """Return a value for ``LD_PRELOAD``: the AddressSanitizer runtime that a module was linked to, and libstdc++."""
    linked = subprocess.run(["ldd", str(module)], capture_output=True, text=True, check=True).stdout
    paths = [line.split("=>")[1].split()[0] for line in linked.splitlines() if "=>" in line]
    runtime = [path for path in paths if Path(path).name.startswith("libasan.")]
    if not runtime:
        raise SystemExit(f"{module} is not linked to a shared AddressSanitizer runtime: build it with GCC")
    return ":".join([*runtime, *(path for path in paths if Path(path).name.startswith("libstdc++."))])


def main(build: Path, arguments: list[str]) -> int:
    """Run pytest and return its exit status."""
    folder = link_package(build)
    environment = os.environ | {
        "LD_PRELOAD": libraries_to_preload(folder / "scan_fast" / "_C.so"),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(folder),
    }
    paths = f"pythonpath={folder} {ROOT} {ROOT / 'tests' / 'helpers'} {ROOT / 'tests' / 'native'}"
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", "-o", paths, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
