"""A finished run that tests look at or copy, and protection of what commands change in this process."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from driving import TINY, fill, run_here


@pytest.fixture(autouse=True)
def _process_state(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Give threads back, and keep default run folders out of the source tree."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on digits; to be looked at only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    threads = torch.get_num_threads()
    result = run_here("run", "digits", *TINY, "--out", folder, "--quiet")
    torch.set_num_threads(threads)
    assert result.code == 0, result.err
    return folder


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A flat folder of 36 images of three kinds."""
    fill(tmp_path / "images", 36)
    return tmp_path / "images"
