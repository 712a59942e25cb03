"""Uses what was carried to a machine without network: the compiled module and wheels that ``tools/gpu_build`` prepared.

Standard library only, and nothing of scan_fast is imported: this runs before ``import scan_fast``, which loads the
module. Each refusal is one line, so that the caller can build there or continue without.
"""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "gpu_carry"
RECORD = "module.json"
WHEELS = "wheels"
ARCHIVE = "cifar10-jpeg.tar.xz"


class CarriedError(RuntimeError):
    """Wheels cannot be installed; the message is one line."""


def use(folder: Path | str = FOLDER, root: Path = ROOT) -> str:
    """Put the carried module into ``scan_fast/`` if it fits this interpreter, its torch and this tree.

    Args:
        folder: holds the module and module.json, as ``tools/gpu_build`` writes them.
        root: the source tree.

    Returns:
        "" if the module is in place now; otherwise one line that says why not.
    """
    record_file = Path(folder) / RECORD
    try:
        record: dict[str, Any] = json.loads(record_file.read_text(encoding="utf-8"))
        module = Path(folder) / record["module"]
        wanted = {key: record[key] for key in ("python", "machine", "torch", "sources", "host", "sha256")}
    except FileNotFoundError:
        return f"no module was carried: {record_file} does not exist"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{record_file} cannot be read: {type(error).__name__}: {error}"
    if not module.is_file():
        return f"{record_file} names {module.name}, which is not there"
    here = {"python": sys.implementation.cache_tag, "machine": platform.machine(), "torch": torch_version()}
    for key, name in (("python", "Python"), ("machine", "a CPU of type"), ("torch", "torch")):
        if wanted[key] != here[key]:
            return f"the carried module is for {name} {wanted[key]}, this is {here[key] or 'missing'}"
    changed = changed_sources(wanted, sources(root))
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"the carried module is of other sources: {', '.join(changed[:3])}{more} differ"
    content = module.read_bytes()
    if hashlib.sha256(content).hexdigest() != wanted["sha256"]:
        return f"{module} is damaged: it is not the file that {RECORD} describes"
    target = root / "scan_fast" / module.name
    if target.is_file() and target.read_bytes() == content:
        return ""
    if "scan_fast._C" in sys.modules:
        return "the carried module came too late: scan_fast is imported already"
    try:
        # Written beside it and renamed: a kill leaves the former module or this one, and a process that maps the former
        # one keeps it.
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    except OSError as error:
        return f"the carried module cannot be copied to {target}: {error.strerror or error}"
    return ""


def torch_version() -> str:
    """Return the version of the torch that would be imported, such as "2.11.0+cu130", without importing it; "" if none.

    The metadata of the package may lack what follows the plus sign.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    return found[1] if found else ""


def sources(root: Path = ROOT) -> dict[str, Any]:
    """Return the hashes of a tree's native sources.

    Returns:
        ``sources``: the hash of each CUDA source by name, as ``scan_fast.gpu_status`` computes it; ``host``: one hash
        of all C++ sources, which decides whether the module fits the Python side.
    """
    status = gpu_status(root)
    csrc = root / "csrc"
    host = hashlib.sha256()
    for path in sorted(csrc.rglob("*.cpp")):
        if {"tests", "testing"}.isdisjoint(path.relative_to(csrc).parts) and not path.name.startswith("emulator"):
            host.update(status.source_hash(csrc, path).encode())
    kernels = status.kernels_of(csrc).items()
    return {"sources": {name: status.source_hash(csrc, path) for name, path in kernels}, "host": host.hexdigest()}


def changed_sources(of_module: dict[str, Any], of_tree: dict[str, Any]) -> list[str]:
    """Return the names of the sources that differ between two answers of :func:`sources`."""
    names = {**of_module["sources"], **of_tree["sources"]}
    changed = [name for name in names if of_module["sources"].get(name) != of_tree["sources"].get(name)]
    return changed + (["the C++ sources"] if of_module["host"] != of_tree["host"] else [])


def gpu_status(root: Path = ROOT) -> ModuleType:
    """Import ``scan_fast.gpu_status`` without its package, which would load torch and the compiled module."""
    path = root / "scan_fast" / "gpu_status.py"
    spec = importlib.util.spec_from_file_location("carried_gpu_status", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheels(folder: Path | str = FOLDER, names: tuple[str, ...] = ()) -> Path:
    """Install carried wheels into a temporary folder, offline, and return it: for ``sys.path`` or ``PYTHONPATH``.

    The folder is removed when this process ends.

    Args:
        folder: as for :func:`use`; the wheels are in its folder ``wheels``.
        names: only these projects (e.g. ``("inf_cl",)``); all by default.

    Raises:
        CarriedError: if there are none, or pip refuses one.
    """
    found = sorted((Path(folder) / WHEELS).glob("*.whl"))
    if names:
        wanted = {_normal(name) for name in names}
        found = [path for path in found if _normal(path.name.split("-")[0]) in wanted]
        lacking = wanted - {_normal(path.name.split("-")[0]) for path in found}
        if lacking:
            raise CarriedError(f"no wheel of {', '.join(sorted(lacking))} was carried in {Path(folder) / WHEELS}")
    if not found:
        raise CarriedError(f"no wheels were carried: {Path(folder) / WHEELS} holds none")
    target = Path(tempfile.mkdtemp(prefix="carried-wheels-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--only-binary=:all:"]
    command += ["--no-compile", "--no-cache-dir", "--disable-pip-version-check", "--no-warn-script-location"]
    done = subprocess.run([*command, "--target", str(target), *map(str, found)], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
        raise CarriedError(f"the carried wheels cannot be installed: {errors[0].removeprefix('ERROR: ')}")
    return target


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
