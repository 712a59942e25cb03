"""The cost of digests is counted where they are computed."""

from __future__ import annotations

from pathlib import Path

from driving import TINY

from benchmarks.digests import measure


def test_digests_of_a_run_are_counted(tmp_path: Path) -> None:
    found = measure(["run", "digits", *TINY, "--quiet", "--out", str(tmp_path / "run")])
    assert found["calls"]["files"] > 50
    assert found["calls"]["images"] == 2, "digits are arrays, of two splits"
    assert 0 < found["share"] < 0.5
