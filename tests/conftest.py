from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

NATIVE = Path(__file__).parent / "native"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that compile, which take longest, so that no process is left with them at the end."""
    items.sort(key=lambda item: NATIVE not in item.path.parents)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Undo a change of the number of threads: a run in this process sets it, and sums depend on it."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)
