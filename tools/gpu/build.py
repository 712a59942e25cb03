"""Prepares what is carried to a rented machine with a GPU and without network; run it as ``tools/gpu_build``.

It builds the compiled module for that machine's Python and torch. Any Linux with nvcc and no newer C library than the
target's will do; no GPU is needed. It strips the module, checks its size, its ABI and the libraries that it needs,
imports it in a copy of the tree and runs the self-tests of its CPU kernels. Then it adds wheels of what the driver
needs and such a machine lacks, and on request the wheels of the peers and an archive of images. Everything is in one
folder, which git ignores; :mod:`tools.gpu.carried` uses it there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.files import write_json

from . import carried

ROOT = carried.ROOT
WORK = ROOT / "build" / "gpu_build"
ARCHITECTURES = "90a"
# Versions of systems of 2022: glibc 2.34 (Ubuntu 22.04, RHEL 9) and the libraries of GCC 12.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GOMP": (5, 0), "GCC": (12, 0)}
# Libraries of torch's wheel, of the CUDA runtime beside it, and of every system.
LIBRARIES = re.compile(
    r"lib(c10|c10_cuda|torch|torch_cpu|torch_cuda|torch_python)\.so|libcudart\.so\.13|libgomp\.so\.1|libstdc\+\+\.so\.6"
    r"|lib(c|m|dl|rt|pthread)\.so\.\d|libgcc_s\.so\.1|ld-linux-x86-64\.so\.2"
)
DRIVER = ("pydantic",)
PEERS = ("inf-cl", "memeff", "siglip-kernel")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MIB = 1 << 20

_INTERPRETER = """
import json, platform, sys
try:
    import torch
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
except ImportError as error:
    found = {"torch": "", "cuda": None, "error": str(error)}
found |= {"python": sys.implementation.cache_tag, "version": platform.python_version(), "machine": platform.machine()}
print(json.dumps(found))
"""

# Runs in a copy of the tree that holds no module yet, as on the other machine.
_TRIAL = """
import json, sys
from tools.gpu import carried
refusal = carried.use(sys.argv[1])
if refusal:
    sys.exit(refusal)
import torch
from scan_fast.ops import native, self_test
from scan_fast.ops.families import GPU_FAMILIES
if not native.is_available():
    sys.exit(native.load_error)
errors = {}
for family in GPU_FAMILIES:
    result = self_test.run(family.name, "portable", torch.device("cpu"))
    if not result.passed:
        sys.exit(f"the CPU kernels of {family.name} fail their self-test: {result.reason}")
    errors[family.name] = result.worst
print(json.dumps({"build": native.build_info(), "errors": errors}))
"""


class BuildError(RuntimeError):
    """An error that must be fixed before anything can be carried; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the folder; a problem is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="tools/gpu_build", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="an interpreter like that machine's, with its torch")
    parser.add_argument("--want-python", default="3.12", metavar="X.Y", help="its version (default: %(default)s)")
    parser.add_argument("--want-torch", default="2.11.0+cu130", metavar="V", help="its torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=carried.FOLDER, help="the folder to carry")
    parser.add_argument("--data", type=Path, metavar="ARCHIVE", help="add cifar10-jpeg.tar.xz")
    parser.add_argument("--peers", action="store_true", help=f"add wheels of {', '.join(PEERS)}")
    parser.add_argument("--no-wheels", action="store_true", help="leave the wheels as they are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="files compiled at a time")
    parser.add_argument("--module-limit", type=float, default=24, metavar="MIB", help="(default: %(default)s)")
    parser.add_argument(
        "--limit",
        type=float,
        default=64,
        metavar="MIB",
        help="of the folder and the working tree (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    try:
        prepare(options)
    except BuildError as error:
        print(f"gpu_build: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Build, check and collect everything, and print the results."""
    begin = time.monotonic()
    interpreter = check_interpreter(options.python, options.want_python, options.want_torch)
    missing = [tool for tool in ("strip", "readelf") if shutil.which(tool) is None]
    if missing:
        raise BuildError(f"{' and '.join(missing)} of the binutils are needed and not on the PATH")
    if options.data is not None and not options.data.is_file():
        raise BuildError(f"--data: {options.data} is no file")
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    before = carried.sources()
    built = compile_module(options.python, interpreter, options.jobs)
    if carried.changed_sources(before, carried.sources()):
        raise BuildError("the sources changed while they were compiled: start again")
    report = check_module(built, options.module_limit)
    # Without a record no module is used: a kill from here on leaves none that seems complete.
    (out / carried.RECORD).unlink(missing_ok=True)
    for former in out.glob("_C.*.so"):
        former.unlink()
    shutil.copyfile(built, out / built.name)
    record = {"module": built.name, **interpreter, "cuda_archs": ARCHITECTURES, **before, **report, "commit": commit()}
    record["sha256"] = hashlib.sha256(built.read_bytes()).hexdigest()
    write_json(out / carried.RECORD, record)
    trial = try_module(options.python, out)
    write_json(out / carried.RECORD, record | {"wait_limit": trial["build"].get("wait_limit", False)})
    stamped = trial["build"].get("sources", before["sources"])
    if stamped != before["sources"]:
        raise BuildError("the module says that it was built from other sources than this tree's")
    needs = " and ".join(f"{library} {report['symbols'].get(library, 'none')}" for library in ("GLIBC", "GLIBCXX"))
    seconds = time.monotonic() - begin
    print(f"module: {built.name}, {report['bytes'] / MIB:.1f} MiB, needs {needs}; built and checked in {seconds:.0f} s")
    if not trial["build"].get("wait_limit"):
        print("module: its kernels wait without a limit (its build does not know SCAN_FAST_WAIT_LIMIT)")
    for name, error in trial["errors"].items():
        print(f"  {name}: passes its self-test on the CPU, with {error:.0%} of the error that is allowed")
    if not options.no_wheels:
        fetch_wheels(out / carried.WHEELS, options)
    if options.data is not None:
        shutil.copyfile(options.data, out / carried.ARCHIVE)
    print(check_total(out, options.limit))


def check_interpreter(python: str, want_python: str, want_torch: str) -> dict[str, str]:
    """Return the tag, machine type and torch version of an interpreter.

    Raises:
        BuildError: if it is missing or not the wanted one.
    """
    try:
        done = subprocess.run([python, "-c", _INTERPRETER], capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"--python: {python} cannot be run ({error.strerror})") from error
    if done.returncode:
        raise BuildError(f"--python: {python} fails: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    found = json.loads(done.stdout)
    if not (found["version"] + ".").startswith(want_python + "."):
        raise BuildError(f"--python: {python} is Python {found['version']}, wanted is {want_python}")
    if found["torch"] != want_torch:
        has = f"torch {found['torch']}" if found["torch"] else "no torch"
        raise BuildError(f"--python: {python} has {has}, wanted is {want_torch}")
    return {key: found[key] for key in ("python", "machine", "torch")}


def compile_module(python: str, interpreter: dict[str, str], jobs: int) -> Path:
    """Build and strip the module in a separate folder, and return it; the modules of the tree are not touched."""
    library = WORK / "lib"
    shutil.rmtree(library, ignore_errors=True)
    environment = os.environ | {
        "SCAN_FAST_CUDA": "on",
        "SCAN_FAST_CUDA_ARCHS": ARCHITECTURES,
        "SCAN_FAST_WAIT_LIMIT": "1",
        "SCAN_FAST_BUILD_TESTS": "0",
        "MAX_JOBS": str(jobs),
    }
    WORK.mkdir(parents=True, exist_ok=True)
    log = WORK / "log.txt"
    command = [python, "setup.py", "build_ext", "--build-lib", str(library), "--build-temp", str(WORK / "temp")]
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    modules = list((library / "scan_fast").glob("_C.*.so"))
    if done.returncode or len(modules) != 1:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        wrong = [line for line in lines if re.search(r"\berror\b|not found", line)] or lines[-1:] or ["no output"]
        raise BuildError(f"the build failed ({log}): {wrong[0].strip()}")
    module = modules[0]
    if interpreter["python"] not in module.name:
        raise BuildError(f"the build made {module.name}, which is not for {interpreter['python']}")
    subprocess.run(["strip", "--strip-unneeded", str(module)], check=True)
    return module


def check_module(module: Path, limit: float) -> dict[str, Any]:
    """Check a module's size, the symbol versions and libraries it needs, and its search path.

    Args:
        module: an ELF file.
        limit: its largest size in MiB.

    Returns:
        ``bytes``; ``symbols``: the newest version it needs of each of ``NEWEST``; ``libraries``: all that it names.

    Raises:
        BuildError: names the first thing that would keep it from loading elsewhere.
    """
    size = module.stat().st_size
    if size > limit * MIB:
        raise BuildError(f"{module.name} has {size / MIB:.1f} MiB, more than {limit:g}")
    environment = os.environ | {"LC_ALL": "C"}
    done = subprocess.run(["readelf", "-dVW", str(module)], capture_output=True, text=True, env=environment)
    if done.returncode or "Dynamic section" not in done.stdout:
        raise BuildError(f"{module.name} is no shared library")
    libraries = re.findall(r"\(NEEDED\)\s+Shared library: \[([^\]]+)\]", done.stdout)
    foreign = [name for name in libraries if not LIBRARIES.fullmatch(name)]
    if foreign:
        raise BuildError(f"{module.name} needs {', '.join(foreign)}, which neither torch nor the system provides")
    paths = re.findall(r"\((?:RPATH|RUNPATH)\)\s+Library r(?:un)?path: \[([^\]]*)\]", done.stdout)
    outside = [path for text in paths for path in text.split(":") if not path.startswith("$ORIGIN")]
    if outside:
        raise BuildError(f"{module.name} looks for libraries in {outside[0]}, a folder of this machine")
    needed = newest_symbols(re.findall(r"Name: (\S+)\s+Flags:", done.stdout))
    for library, newest in NEWEST.items():
        if needed.get(library, ()) > newest:
            wanted, there = (".".join(map(str, version)) for version in (needed[library], newest))
            raise BuildError(f"{module.name} needs {library}_{wanted}, the other machine may have {there} only")
    symbols = {library: ".".join(map(str, version)) for library, version in needed.items()}
    return {"bytes": size, "symbols": symbols, "libraries": libraries}


def newest_symbols(names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Return the newest version of each library among names such as "GLIBC_2.34"."""
    newest: dict[str, tuple[int, ...]] = {}
    for name in names:
        found = re.fullmatch(r"([A-Z]+)_([\d.]+)", name)
        if found:
            version = tuple(map(int, found[2].split(".")))
            newest[found[1]] = max(newest.get(found[1], ()), version)
    return newest


def try_module(python: str, out: Path) -> dict[str, Any]:
    """Use the module in a copy of the tree, as on the other machine, and run the self-tests of its CPU kernels.

    Returns:
        ``build``: the module's build_info; ``errors``: by family, the largest error as a share of what is allowed.

    Raises:
        BuildError: if it is refused, does not load or computes something wrong.
    """
    with tempfile.TemporaryDirectory(prefix="gpu-build-") as folder:
        copy = Path(folder)
        for name in ("scan_fast", "csrc", "benchmarks", "tools"):
            unneeded = shutil.ignore_patterns("*.so", "__pycache__", "results", "tests")
            shutil.copytree(ROOT / name, copy / name, ignore=unneeded)
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        command = [python, "-c", _TRIAL, str(out.resolve())]
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode:
        message = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BuildError(f"the module fails under {python}: {message}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def fetch_wheels(folder: Path, options: argparse.Namespace) -> None:
    """Download the wheels again, and list them.

    The driver's needs come with their dependencies; peers come alone, since theirs are installed there.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for names, more, must in (
        (DRIVER, [], True),
        *(((peer,), ["--no-deps"], False) for peer in PEERS if options.peers),
    ):
        command = [options.python, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", *more]
        command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", options.want_python]
        command += [word for name in PLATFORMS for word in ("--platform", name)]
        done = subprocess.run([*command, "--dest", str(folder), *names], capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["pip failed"]
            text = f"no wheel of {', '.join(names)}: {lines[0].removeprefix('ERROR: ')}"
            if must:
                raise BuildError(text)
            print(f"  {text}; it is left out")
    for wheel in sorted(folder.glob("*.whl")):
        if not zipfile.is_zipfile(wheel):
            raise BuildError(f"{wheel} is damaged")
        print(f"  {wheel.name}, {wheel.stat().st_size / MIB:.2f} MiB")


def check_total(out: Path, limit: float) -> str:
    """Return one line about the size of what is carried.

    Raises:
        BuildError: if the folder and the working tree exceed ``limit`` MiB; names the largest files.
    """
    tree = {path: (ROOT / path).lstat().st_size for path in working_tree() if (ROOT / path).is_file()}
    folder = {str(path.relative_to(out)): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    total = sum(tree.values()) + sum(folder.values())
    text = f"{sum(folder.values()) / MIB:.1f} MiB in {out}, {sum(tree.values()) / MIB:.1f} MiB in the working tree"
    if total > limit * MIB:
        largest = sorted((tree | folder).items(), key=lambda entry: -entry[1])[:3]
        names = ", ".join(f"{name} ({size / MIB:.1f} MiB)" for name, size in largest)
        raise BuildError(f"{text}: more than {limit:g} MiB together; the largest are {names}")
    return f"to carry: {text}, of {limit:g} MiB"


def working_tree() -> list[str]:
    """Return the files of the working tree that git sees: tracked, and new but not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name]


def commit() -> str:
    """Return the commit, with a note if files differ from it; without git, SCAN_FAST_COMMIT."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        return os.environ.get("SCAN_FAST_COMMIT", "unknown")
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return done.stdout.strip() + (" with changes" if changed.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
