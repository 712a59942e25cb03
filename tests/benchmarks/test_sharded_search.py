from __future__ import annotations

import sys
from argparse import Namespace

import pytest
import torch

from benchmarks.sharded_search import lists_of_one_process, rows_of, run
from scan_fast.ops import native


def test_rows_depend_on_their_number_alone() -> None:
    whole = rows_of(0, 2_500, 3, torch.float32)
    assert torch.equal(whole, torch.cat([rows_of(0, 1_000, 3, torch.float32), rows_of(1_000, 2_500, 3, torch.float32)]))
    assert torch.equal(whole[999:2_001], rows_of(999, 2_001, 3, torch.float32))
    assert len(whole.unique(dim=0)) == 2_500


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.skipif(not native.is_available(), reason="the bound is that of the compiled kernel")
@pytest.mark.slow
def test_memory_of_a_rank_follows_its_part_of_the_rows() -> None:
    """Every rank stays below the documented bound, which falls with the number of ranks, and finds the same lists."""
    options = Namespace(rows=24_001, columns=256, k=10, dtype="float32")
    expected = lists_of_one_process(options)
    peaks = {}
    for ranks in (1, 3):
        results, lists = run(options, ranks)
        assert lists == expected and len(lists) == 64
        assert sum(result["rows"] for result in results) == 24_001
        assert all(result["peak_bytes"] <= result["bound_bytes"] for result in results), results
        for rank, result in enumerate(results):
            rows_not_sent = results[(rank + 1) % ranks]["rows"]
            assert result["bytes_sent"] == (24_001 - rows_not_sent) * 256 * 4
        peaks[ranks] = max(result["peak_bytes"] for result in results)
    assert peaks[3] < 0.6 * peaks[1]
