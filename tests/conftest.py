from __future__ import annotations

from pathlib import Path

import pytest
import torch

NATIVE = Path(__file__).parent / "native"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start with the tests that compile, which take longest, so that no process is left with them at the end."""
    items.sort(key=lambda item: NATIVE not in item.path.parents)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)
