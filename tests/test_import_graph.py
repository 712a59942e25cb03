"""The import graph of the package: no circles, and every arrow points down the layers of docs/architecture.md."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "scan_fast"

LAYERS: tuple[tuple[str, ...], ...] = (
    ("text",),
    ("schema", "errors", "atomic", "array_files", "gpu_status", "openmp", "parsing"),
    ("completion", "threads"),
    ("ops",),
    ("distributed",),
    ("devices",),
    ("random", "losses", "neighbors"),
    ("data",),
    ("views", "models", "evaluation"),
    ("methods", "objectives"),
    ("partitions",),
    ("runs", "data_option"),
    ("training", "predictor", "report"),
    ("stages", "reference", "reference_export", "export", "info"),
    ("sharing",),
    ("sweep", "estimator", "planning", "finishing", "evaluating", "probing"),
    ("ablation", "reference_evaluation", "queries"),
    ("commands", "applying", "experiments"),
    ("cli",),
    ("__main__",),
)
"""From the bottom to the top. A module imports from its own layer's package or from lower layers."""

LIBRARY = ("ops", "losses", "neighbors")
"""The kernel library, which imports torch alone."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Return the modules of the package that a module imports, inside functions too; not for type checking alone."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                found |= {known for known in (target,) if known in MODULES} or ({base} & MODULES.keys())
    return found - {name, "scan_fast"}  # the root package is imported for its version and its native module


GRAPH = {name: imports(name) for name in MODULES}


def test_the_graph_is_read() -> None:
    assert "scan_fast.training.loop" in GRAPH["scan_fast.stages.pretext"]
    assert "scan_fast.ops.trust" in GRAPH["scan_fast.views.renderers"]


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for other in sorted(GRAPH[name]):
                visit(other, (*trail, name))
            done.add(name)

    for name in sorted(GRAPH):
        visit(name, ())


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", [name for name in sorted(GRAPH) if room(name)])
def test_imports_point_down(name: str) -> None:
    height = {member: number for number, layer in enumerate(LAYERS) for member in layer}
    assert room(name) in height, f"{name}: say in LAYERS where it belongs"
    for other in GRAPH[name]:
        if room(other) and room(other) != room(name):
            assert height[room(other)] < height[room(name)], f"{name} imports {other}"


def test_stages_do_not_import_each_other() -> None:
    learned = {f"scan_fast.stages.{name}" for name in ("pretext", "mining", "clustering", "selflabel")}
    for name in learned:
        assert not GRAPH[name] & (learned - {name}), name


def test_the_kernel_library_needs_torch_alone() -> None:
    allowed = {"torch", "numpy", "scan_fast"}
    for name, path in MODULES.items():
        if room(name) not in LIBRARY:
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                names = [node.module]
            for top in {n.split(".")[0] for n in names}:
                assert top in allowed or top in __import__("sys").stdlib_module_names, f"{name} imports {top}"
