from __future__ import annotations

import os

import pytest

from scan_fast.ops import native


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Fail, rather than skip, the tests of the operators if the package should have a compiled module and has none."""
    if not native.is_available() and os.environ.get("SCAN_FAST_NATIVE") != "0":
        pytest.fail(
            f"scan_fast._C was not loaded ({native.load_error}); build it, or set SCAN_FAST_NATIVE=0 to test the "
            "package without it",
            pytrace=False,
        )
