"""The scripts of examples/ run as they are, and do what they are there to show.

Those for several processes have their tests in test_distributed_examples.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("distributed_"))


def output(name: str, folder: Path) -> str:
    """Return what a script prints. It runs in an empty folder, on one thread, and leaves nothing there."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{name}: {result.stderr}"
    assert not list(folder.iterdir()), f"{name} leaves files in the working directory"
    return result.stdout


def number(text: str, after: str) -> float:
    match = re.search(re.escape(after) + r"[^\d-]*(-?[\d.]+)", text)
    assert match is not None, (after, text)
    return float(match[1])


@pytest.mark.slow
def test_training_loop(tmp_path: Path) -> None:
    text = output("training_loop.py", tmp_path)
    assert number(text, "neighbours of the same digit:") > 85
    assert number(text, "accuracy:") > 60  # chance is about 15


@pytest.mark.slow
def test_cluster_arrays(tmp_path: Path) -> None:
    text = output("cluster_arrays.py", tmp_path)
    assert number(text, "adjusted Rand index:") > 0.3
    assert "loaded model agrees: True" in text


@pytest.mark.slow
def test_nearest_neighbors(tmp_path: Path) -> None:
    text = output("nearest_neighbors.py", tmp_path)
    assert number(text, "neighbours of the same group:") > 95
    assert "equal to the reference: True" in text


def test_every_example_is_tested() -> None:
    source = Path(__file__).read_text()
    for name in EXAMPLES:
        assert f'output("{name}", tmp_path)' in source, name
