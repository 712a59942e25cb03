"""Lowest versions for ``make test-oldest``, as pyproject.toml states them."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest

from tools import test_oldest as oldest
from tools.check_dist import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    "requirement, expected", [("torch>=2.11", "torch==2.11.*"), ("typing-extensions>=4.8", "typing-extensions==4.8.*")]
)
def test_a_lower_bound_becomes_that_version(requirement: str, expected: str) -> None:
    assert oldest.lowest(requirement) == expected


@pytest.mark.parametrize("requirement", ["torch", "torch>=2.11,<3", "torch>2", "torch[opt]>=2"])
def test_anything_but_a_lower_bound_is_refused(requirement: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must be written NAME>=VERSION, got {requirement!r}")):
        oldest.lowest(requirement)


def test_every_dependency_has_a_lower_bound_and_torch_is_among_them() -> None:
    pinned = [oldest.lowest(requirement) for requirement in PROJECT["dependencies"]]
    assert {requirement.split("==")[0] for requirement in pinned} >= set(oldest.PYTORCH)


def test_the_oldest_python_is_the_first_classifier() -> None:
    prefix = "Programming Language :: Python :: "
    minors = [word.removeprefix(f"{prefix}3.") for word in PROJECT["classifiers"] if word.startswith(f"{prefix}3.")]
    assert oldest.oldest_python(PROJECT["requires-python"]) == f"3.{min(map(int, minors))}"
    with pytest.raises(ValueError, match=r"requires-python must be >=3\.MINOR, got '>=3\.10,<4'"):
        oldest.oldest_python(">=3.10,<4")


def test_python_is_found_past_a_shim_that_starts_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shim = tmp_path / "shims" / "python3.99"
    shim.parent.mkdir()
    shim.write_text("#!/bin/sh\nexit 127\n")
    shim.chmod(0o755)
    monkeypatch.setenv("PATH", f"{shim.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(SystemExit, match=r"Python 3\.99 was not found .* name it by --python"):
        oldest.find_python("3.99")
    version = tmp_path / "versions" / "3.99.1" / "bin" / "python3.99"
    version.parent.mkdir(parents=True)
    version.symlink_to(sys.executable)
    assert oldest.find_python("3.99") == version
