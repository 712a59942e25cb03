from __future__ import annotations

import sys
from argparse import Namespace

import pytest

from benchmarks.streaming import run


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.slow
def test_memory_of_a_streamed_folder_grows_by_its_paths_alone() -> None:
    """Listing, opening and an epoch: what is kept of a file is its name and header, not its 3,072 bytes of pixels."""
    options = Namespace(device="cpu", width=8, height=8, image_size=32, batch_size=256, workers=2, resident=False)
    few, many = run(options, 2_000), run(options, 20_000)
    assert (few["files"], many["files"]) == (2_000, 20_000)
    growth = many["peak_bytes"] - few["peak_bytes"]
    assert growth < 1500 * 18_000, f"{growth / 18_000:.0f} bytes per file"
