"""Test with the oldest Python and packages that pyproject.toml admits.

    python -m tools.test_oldest [--python INTERPRETER]

An environment in build/oldest gets the lowest version of each dependency and the wheel that is built from the source
distribution, without CUDA. A part of the tests and a short run on the digits must pass there. That Python has to be on
the PATH, among pyenv's versions, or given.

PyTorch's CUDA libraries are large and the CPU does not use them, but PyTorch loads them. So those of the present
environment are linked if it has any; otherwise they are installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

from tools.check_dist import DIGITS, ROOT, USE, build_sdist, build_wheel, check_contents, plain_environment

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

OLDEST = ROOT / "build" / "oldest"
PYTORCH = ("torch", "torchvision")
NEEDED_BY_PYTORCH = ("filelock", "fsspec", "networkx", "setuptools>=77,<82", "sympy")
"""Requirements of torch that are neither CUDA's libraries nor requirements of scan-fast."""
TOOLS = ("pybind11", "ninja", "wheel", "pytest>=8", "pytest-benchmark", "hypothesis")
TESTS = (
    "tests/test_random_streams.py",
    "tests/ops/test_batch_norm.py",
    "tests/ops/test_neighbors.py",
    "tests/ops/test_nt_xent.py",
    "tests/ops/test_scan_loss.py",
    "tests/ops/test_self_label.py",
    "tests/models/test_batch_norm_act.py",
    "tests/driver/test_config.py",
    "tests/driver/test_estimator.py",
)


def lowest(requirement: str) -> str:
    """Turn ``name>=VERSION`` into a requirement of that version: ``torch>=2.11`` into ``torch==2.11.*``.

    Raises:
        ValueError: if the requirement is anything but a lower bound.
    """
    match = re.fullmatch(r"([A-Za-z0-9._-]+)>=([0-9.]+)", requirement)
    if match is None:
        raise ValueError(f"a dependency must be written NAME>=VERSION, got {requirement!r}")
    return f"{match[1]}=={match[2]}.*"


def oldest_python(requires_python: str) -> str:
    """Return the version in ``requires-python``, such as 3.10.

    Raises:
        ValueError: if it is anything but a lower bound.
    """
    match = re.fullmatch(r">=(3\.\d+)", requires_python)
    if match is None:
        raise ValueError(f"requires-python must be >=3.MINOR, got {requires_python!r}")
    return match[1]


def find_python(version: str) -> Path:
    """Return an interpreter of this version from the PATH or from pyenv.

    Raises:
        SystemExit: if there is none.
    """
    on_path = shutil.which(f"python{version}")
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*([Path(on_path)] if on_path else []), *sorted(versions.glob(f"{version}.*/bin/python{version}"))]
    for candidate in candidates:  # a shim of pyenv is on the PATH even if it starts nothing
        if subprocess.run([candidate, "-c", ""], capture_output=True).returncode == 0:
            return candidate
    raise SystemExit(f"Python {version} was not found on the PATH or in {versions}; install it, or name it by --python")


def create_environment(python: Path, dependencies: list[str]) -> Path:
    """Create build/oldest with the lowest versions of the dependencies, and return its interpreter."""
    pinned = [lowest(requirement) for requirement in dependencies]
    pytorch = [requirement for requirement in pinned if requirement.split("==")[0] in PYTORCH]
    others = [requirement for requirement in pinned if requirement not in pytorch]
    shutil.rmtree(OLDEST, ignore_errors=True)
    subprocess.run([python, "-m", "venv", OLDEST], check=True)
    interpreter = OLDEST / "bin" / "python"
    pip = [str(interpreter), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    libraries = Path(sysconfig.get_paths()["purelib"]) / "nvidia"
    if libraries.is_dir():
        site = subprocess.check_output([interpreter, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"])
        subprocess.run([*pip, "--no-deps", *pytorch], check=True)
        (Path(site.decode().strip()) / "nvidia").symlink_to(libraries)
        subprocess.run([*pip, *NEEDED_BY_PYTORCH, *others, *TOOLS], check=True)
    else:
        subprocess.run([*pip, *pytorch, *NEEDED_BY_PYTORCH, *others, *TOOLS], check=True)
    return interpreter


def main() -> int:
    """Create the environment, build and install the wheel, run the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", type=Path, help="interpreter of the oldest supported version")
    options = parser.parse_args()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = options.python or find_python(oldest_python(project["requires-python"]))
    begin = time.perf_counter()
    interpreter = create_environment(python, project["dependencies"])
    print(f"created {OLDEST} in {time.perf_counter() - begin:.0f} s", flush=True)
    environment = plain_environment()
    with tempfile.TemporaryDirectory(prefix="scan-fast-oldest-") as temporary:
        work = Path(temporary)
        begin = time.perf_counter()
        sdist = build_sdist(work)
        wheel = build_wheel(interpreter, sdist, work, environment)
        print(f"built {wheel.name} in {time.perf_counter() - begin:.0f} s", flush=True)
        problems = check_contents(sdist, wheel)
        if problems:
            print(*problems, sep="\n", file=sys.stderr)
            return 1
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run([interpreter, *install], check=True, cwd=work, env=environment)
        # A copy, because the tests import the working tree's package otherwise.
        shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", work)
        subprocess.run([interpreter, "-c", USE.format(root=str(ROOT))], check=True, cwd=work, env=environment)
        subprocess.run([interpreter, "-m", "pytest", "-m", "not slow", *TESTS], check=True, cwd=work, env=environment)
        subprocess.run([OLDEST / "bin" / "scan-fast", *DIGITS], check=True, cwd=work, env=environment)
    return 0


if __name__ == "__main__":
    sys.exit(main())
