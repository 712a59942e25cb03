"""The hooks of pre-commit run the commands of `make lint`, in the versions of the development group."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
DEVELOPMENT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["dev"]
REPOSITORIES: list[dict[str, Any]] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
TOOLS = {
    "https://github.com/astral-sh/ruff-pre-commit": "ruff",
    "https://github.com/pre-commit/mirrors-clang-format": "clang-format",
}
"""Tool of the development group that the hooks of a repository run."""
COMMANDS = {"ruff-check": "ruff check", "ruff-format": "ruff format", "clang-format": "clang-format"}
"""Commands of hooks that their repository defines."""
WITHOUT_TOOL = {"https://github.com/pre-commit/pre-commit-hooks", "local"}


def test_every_hook_has_the_version_of_the_development_group() -> None:
    pinned = dict(text.split("==") for text in DEVELOPMENT if "==" in text)
    revisions = {found["repo"]: found["rev"] for found in REPOSITORIES if found["repo"] not in WITHOUT_TOOL}
    assert revisions == {repository: f"v{pinned[tool]}" for repository, tool in TOOLS.items()}
    assert "mypy" in pinned


def test_the_hooks_run_the_commands_of_make_lint() -> None:
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    lint = {re.sub(r"^\t\$\(BIN\)/", "", line) for line in recipe.splitlines()}
    hooks = [hook for found in REPOSITORIES for hook in found["hooks"]]
    commands = {COMMANDS.get(hook["id"], hook.get("entry")) for hook in hooks} - {None}
    assert commands == {re.sub(r"^(ruff \w+|clang-format) .*", r"\1", command) for command in lint}
