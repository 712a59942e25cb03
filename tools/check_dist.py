"""Build the source distribution, from it the wheel in a fresh environment, and use the wheel there.

    python -m tools.check_dist [--keep FOLDER]

The fresh environment sees the packages of the present one (PyTorch is large) except scan-fast, which is built there
without CUDA. Nothing in it can reach the working tree. Exit code 1 if anything is missing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

IN_SDIST = (
    "CMakeLists.txt",
    "setup.py",
    "pyproject.toml",
    "LICENSE",
    "README.md",
    "configs/ablations/threshold.yaml",
    "configs/digits.yaml",
    "csrc/bindings.cpp",
    "csrc/nt_xent/nt_xent_sm90.cu",
    "csrc/common/device.h",
    "scan_fast/gpu_status.json",
    "scan_fast/report/page/page.html",
)
IN_WHEEL = (
    "scan_fast/configs/ablations/threshold.yaml",
    "scan_fast/configs/digits.yaml",
    "scan_fast/gpu_status.json",
    "scan_fast/py.typed",
    "scan_fast/report/page/page.html",
)
NOT_IN_WHEEL = ("tests/", "benchmarks/", "tools/", "csrc/")

USE = """
import sys
import numpy as np
import torch
import scan_fast
from scan_fast import nt_xent
from scan_fast.ops import native as dispatch

assert "site-packages" in scan_fast.__file__, scan_fast.__file__
assert {root!r} not in sys.path, sys.path
assert dispatch.is_available(), "the native module is missing"
torch.manual_seed(0)
z0, z1 = torch.randn(2, 64, 32)
native, reference = (nt_xent(z0, z1, 0.2, impl=impl) for impl in ("native", "reference"))
torch.testing.assert_close(native, reference)
print("installed:", scan_fast.__version__, scan_fast.__file__)
print("python", sys.version.split()[0], "torch", torch.__version__, "numpy", np.__version__)
"""
DIGITS = (
    "run", "digits", "--out", "run", "data.limit=200", "model.width=0.25", "pretext.epochs=2", "pretext.batch_size=64",
    "clustering.epochs=1", "clustering.heads=1", "selflabel.epochs=1", "evaluation.baselines=false",
)  # fmt: skip


def build_sdist(target: Path) -> Path:
    """Build the source distribution from the working tree into ``target``."""
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--skip-dependency-check"]
    subprocess.run([*command, "--outdir", str(target), str(ROOT)], check=True, stdout=subprocess.DEVNULL)
    (sdist,) = target.glob("*.tar.gz")
    return sdist


def build_wheel(python: Path, sdist: Path, target: Path, environment: dict[str, str]) -> Path:
    """Build the wheel from the source distribution with a fresh environment's interpreter."""
    # Not isolated: the native module must be built against the very torch that will load it.
    command = [str(python), "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(target), str(sdist)], check=True, cwd=target, env=environment)
    (wheel,) = target.glob("*.whl")
    return wheel


def check_contents(sdist: Path, wheel: Path) -> list[str]:
    """Return what is missing from the distributions, or should not be in them."""
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        in_wheel = set(archive_of_wheel.namelist())
    problems = [f"{sdist.name} lacks {name}" for name in IN_SDIST if name not in in_sdist]
    problems += [f"{wheel.name} lacks {name}" for name in IN_WHEEL if name not in in_wheel]
    if not any(name.startswith("scan_fast/_C.") and name.endswith(".so") for name in in_wheel):
        problems.append(f"{wheel.name} lacks the native module")
    problems += [f"{wheel.name} holds {name}" for name in sorted(in_wheel) if name.startswith(NOT_IN_WHEEL)]
    return problems


def plain_environment() -> dict[str, str]:
    """Return the environment variables without search paths of Python, and with CUDA left out of builds."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return environment | {"SCAN_FAST_CUDA": "off"}


def fresh_environment(folder: Path) -> Path:
    """Create a virtual environment that sees the present one's packages except scan-fast; return its interpreter."""
    venv.create(folder, with_pip=False, symlinks=True)
    site = next((folder / "lib").glob("python*")) / "site-packages"
    # Links to the single packages: a path to the whole folder would bring the editable installation of scan-fast.
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "scan_fast" not in entry.name and entry.suffix not in (".pth", ".egg-link"):
            (site / entry.name).symlink_to(entry)
    return folder / "bin" / "python"


def main() -> int:
    """Build, inspect, install and use the distributions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="keep the distributions in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scan-fast-dist-") as temporary:
        work = Path(temporary)
        target = options.keep.resolve() if options.keep else work / "dist"
        target.mkdir(parents=True, exist_ok=True)
        for old in [*target.glob("scan_fast-*.tar.gz"), *target.glob("scan_fast-*.whl")]:
            old.unlink()
        sdist = build_sdist(target)
        python = fresh_environment(work / "fresh")
        environment = plain_environment()
        begin = time.perf_counter()
        wheel = build_wheel(python, sdist, target, environment)
        print(f"built {wheel.name} from {sdist.name} in {time.perf_counter() - begin:.0f} s", flush=True)
        problems = check_contents(sdist, wheel)
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 1
        install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(install, check=True, cwd=work, env=environment)
        subprocess.run([str(python), "-c", USE.format(root=str(ROOT))], check=True, cwd=work, env=environment)
        command = [str(work / "fresh" / "bin" / "scan-fast"), *DIGITS]
        subprocess.run(command, check=True, cwd=work, env=environment)
        if not (work / "run" / "report.html").is_file():
            print("the run left no report", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
