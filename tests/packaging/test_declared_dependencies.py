"""Every package that scan_fast imports is declared, as a dependency or as an extra."""

from __future__ import annotations

import ast
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
OTHERWISE = {
    "nvidia": "nvidia-dali-cuda130",
    "faiss": "faiss-cpu",
    "PIL": "pillow",
    "yaml": "pyyaml",
    "sklearn": "scikit-learn",
    "pillow_heif": "pillow-heif",
    "onnxscript": "onnxscript",
}
"""Distributions of modules whose names say nothing, or which may not be installed."""
ONLY_WITH_EXTRA = {"scan_fast/views/dali_graphs.py"}
"""Modules that are imported only if their extra is installed."""


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", text, maxsplit=1)[0].lower().replace("_", "-") for text in requirements}


REQUIRED = names(PROJECT["dependencies"])
OPTIONAL = {name for extra in PROJECT["optional-dependencies"].values() for name in names(extra)}


def imported() -> dict[str, tuple[str, bool]]:
    """Return by top-level module where it is imported, and whether that is at the top of a file."""
    found: dict[str, tuple[str, bool]] = {}
    for path in sorted((ROOT / "scan_fast").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top not in sys.stdlib_module_names and top != "scan_fast":
                    own = str(path.relative_to(ROOT)) not in ONLY_WITH_EXTRA
                    at_top = (own and node in tree.body) or found.get(top, ("", False))[1]
                    found[top] = (str(path.relative_to(ROOT)), at_top)
    return found


IMPORTED = imported()
INSTALLED = packages_distributions()


def distribution(module: str) -> str:
    known = OTHERWISE.get(module) or INSTALLED.get(module, [module])[0]
    return known.lower().replace("_", "-")


def test_imports_are_found() -> None:
    assert {"torch", "numpy", "pydantic", "threadpoolctl", "timm"} <= set(IMPORTED)


@pytest.mark.parametrize("module", sorted(IMPORTED))
def test_an_import_is_declared(module: str) -> None:
    path, at_top = IMPORTED[module]
    name = distribution(module)
    assert name in REQUIRED | OPTIONAL, f"{path} imports {module}, but pyproject.toml does not declare {name}"
    if at_top:
        assert name in REQUIRED, f"{path} imports {module} at its top, but {name} is only an extra"


def test_every_dependency_is_imported() -> None:
    used = {distribution(module) for module in IMPORTED}
    assert not REQUIRED - used - {"torchvision"}, "declared, but imported nowhere"
