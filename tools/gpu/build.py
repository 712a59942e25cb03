"""Prepares what travels to a rented machine with a GPU and without network; run it as ``tools/gpu_build``.

It builds the compiled module for that machine's Python and torch (any Linux with nvcc and no newer a C library than the
target's will do; no GPU is needed), strips it, checks its size, its ABI and the libraries it wants, imports it in a
copy of the tree and compares each loss with the reference. Then it adds wheels of what the driver needs and such a
machine lacks, and, where asked for, the peers' wheels and an archive of images. All of it lies in one folder, which git
ignores; ``tools.gpu.carried`` takes it from there.
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

from . import carried

ROOT = carried.ROOT
WORK = ROOT / "build" / "gpu_build"
ARCHITECTURES = "90a"
# What systems of 2022 have: glibc 2.34 (Ubuntu 22.04, RHEL 9) and the libraries of GCC 12.
NEWEST = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GOMP": (5, 0), "GCC": (12, 0)}
# Of torch's wheel and the CUDA runtime beside it, and of every system.
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
import torch, scan_fast
from scan_fast.ops import native
if not native.is_available():
    sys.exit(native.load_error)
torch.manual_seed(0)
a, b = torch.randn(2, 129, 128)
p, q = torch.randn(2, 3, 129, 10)
losses = {
    "nt_xent": lambda impl: scan_fast.nt_xent(a, b, 0.1, impl=impl),
    "scan_loss": lambda impl: torch.stack(scan_fast.scan_loss(p, q, impl=impl)),
    "self_label_loss": lambda impl: scan_fast.self_label_loss(9 * p[0], q[0], impl=impl)[0],
    "topk_neighbors": lambda impl: scan_fast.topk_neighbors(a, 5, impl=impl)[0],
}
differences = {}
for name, loss in losses.items():
    ours, reference = loss("native"), loss("reference")
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    differences[name] = float((ours - reference).abs().max())
print(json.dumps({"build": native.build_info(), "differences": differences}))
"""


class BuildError(RuntimeError):
    """Something that must be mended before anything can travel; the message is one line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare the folder; a problem is one line on standard error and exit code 2."""
    parser = argparse.ArgumentParser(prog="tools/gpu_build", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="an interpreter like that machine's, with its torch")
    parser.add_argument("--want-python", default="3.12", metavar="X.Y", help="its version (default: %(default)s)")
    parser.add_argument("--want-torch", default="2.11.0+cu130", metavar="V", help="its torch (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=carried.FOLDER, help="the folder that travels")
    parser.add_argument("--data", type=Path, metavar="ARCHIVE", help="also take cifar10-jpeg.tar.xz along")
    parser.add_argument("--peers", action="store_true", help=f"also take wheels of {', '.join(PEERS)} along")
    parser.add_argument("--no-wheels", action="store_true", help="leave the wheels as they are")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compile so many files at a time")
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
    """Do all of it, and say what came of it."""
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
    # Without a record nothing is taken: a kill from here on leaves no module that seems to be whole.
    (out / carried.RECORD).unlink(missing_ok=True)
    for former in out.glob("_C.*.so"):
        former.unlink()
    shutil.copyfile(built, out / built.name)
    record = {"module": built.name, **interpreter, "cuda_archs": ARCHITECTURES, **before, **report, "commit": commit()}
    record["sha256"] = hashlib.sha256(built.read_bytes()).hexdigest()
    write_record(out, record)
    trial = try_module(options.python, out)
    write_record(out, record | {"wait_limit": trial["build"].get("wait_limit", False)})
    stamped = trial["build"].get("sources", before["sources"])
    if stamped != before["sources"]:
        raise BuildError("the module says that it was built from other sources than this tree's")
    needs = " and ".join(f"{library} {report['symbols'].get(library, 'none')}" for library in ("GLIBC", "GLIBCXX"))
    seconds = time.monotonic() - begin
    print(f"module: {built.name}, {report['bytes'] / MIB:.1f} MiB, needs {needs}; built and checked in {seconds:.0f} s")
    if not trial["build"].get("wait_limit"):
        print("module: its kernels wait without a limit (its build does not know SCAN_FAST_WAIT_LIMIT)")
    for name, difference in trial["differences"].items():
        print(f"  {name}: differs from the reference by {difference:.1e} at most (CPU)")
    if not options.no_wheels:
        fetch_wheels(out / carried.WHEELS, options)
    if options.data is not None:
        shutil.copyfile(options.data, out / carried.ARCHIVE)
    print(check_total(out, options.limit))


def check_interpreter(python: str, want_python: str, want_torch: str) -> dict[str, str]:
    """Return the tag, processor and torch version of an interpreter.

    Raises:
        BuildError: where it is missing or another than wanted.
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
    """Build and strip the module in a folder of its own, and return it; the tree's own modules are not touched."""
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
        BuildError: for the first thing that would keep it from loading elsewhere.
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
        raise BuildError(f"{module.name} needs {', '.join(foreign)}, which neither torch nor the system brings")
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


def write_record(out: Path, record: dict[str, Any]) -> None:
    temporary = out / f".{carried.RECORD}"
    temporary.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(temporary, out / carried.RECORD)


def try_module(python: str, out: Path) -> dict[str, Any]:
    """Take the module into a copy of the tree, as the other machine does, and compare the losses with the reference.

    Returns:
        ``build``: what the module says of itself; ``differences``: the largest of each operation.

    Raises:
        BuildError: where it is refused, does not load or computes something else.
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
    """Download the wheels anew, and say what there is.

    What the driver needs comes with its dependencies; peers come alone, for the rest of theirs is there.
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
            print(f"  {text}; it stays behind")
    for wheel in sorted(folder.glob("*.whl")):
        if not zipfile.is_zipfile(wheel):
            raise BuildError(f"{wheel} is damaged")
        print(f"  {wheel.name}, {wheel.stat().st_size / MIB:.2f} MiB")


def check_total(out: Path, limit: float) -> str:
    """Return one line about the size of what travels.

    Raises:
        BuildError: where the folder and the working tree pass ``limit`` MiB; names the largest files.
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
    """Return the files that git would take along: tracked, and new but not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(command, capture_output=True, text=True)
    return [name for name in done.stdout.split("\0") if name]


def commit() -> str:
    """Return the commit, with a note where files differ from it; SCAN_FAST_COMMIT where there is no git."""
    git = ["git", "-C", str(ROOT)]
    done = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    if done.returncode:
        return os.environ.get("SCAN_FAST_COMMIT", "unknown")
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    return done.stdout.strip() + (" with changes" if changed.strip() else "")


if __name__ == "__main__":
    sys.exit(main())
