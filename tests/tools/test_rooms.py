"""Imports between the rooms: tools/ uses benchmarks/, both use the package, and nothing points the other way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FORBIDDEN = {"scan_fast": {"benchmarks", "tools", "tests"}, "benchmarks": {"tools", "tests"}, "tools": {"tests"}}
STANDARD_LIBRARY_ONLY = ("suite", "stages", "jobs", "conclusions", "report", "carried", "build", "run")


def imported(path: Path) -> set[str]:
    """Return the top-level names that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", FORBIDDEN)
def test_imports_point_one_way(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 5
    for path in files:
        assert not imported(path) & FORBIDDEN[room], path


def test_what_starts_the_suite_loads_no_torch() -> None:
    """On a bare machine the module and the wheels are put in place first; a hanging GPU must not stop the suite."""
    names = ", ".join(STANDARD_LIBRARY_ONLY)
    code = f"import sys; from tools.gpu import {names}; "
    code += "print([name for name in ('torch', 'numpy', 'scan_fast') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
