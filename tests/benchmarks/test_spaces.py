"""The comparison of spaces to mine in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from driving import TINY, run_here

from benchmarks import spaces
from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder


def test_spaces_are_unit_rows_and_both_weighs_them_equally() -> None:
    torch.manual_seed(0)
    features, projection = torch.randn(6, 5).relu() + 0.1, 100 * torch.randn(6, 3)
    found = spaces.spaces(features, projection)
    for rows in found.values():
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(6))
    both = (found["projection"] @ found["projection"].T + found["backbone"] @ found["backbone"].T) / 2
    torch.testing.assert_close(found["both"] @ found["both"].T, both)


def test_purity_is_that_of_the_run(tmp_path: Path) -> None:
    threads, folder = torch.get_num_threads(), tmp_path / "run"
    assert run_here("pretext", "digits", *TINY, "--out", folder, "--quiet").code == 0
    assert run_here("mine", folder, "--quiet").code == 0
    torch.set_num_threads(threads)
    with RunFolder(folder) as run:
        at = run.summary().stages["mining"]["purity_at"]["test"]
        embeddings = run.read(artifacts.EMBEDDINGS).rows["test"]
    entry = spaces.measure(folder, None)
    assert entry["images"] == len(embeddings)
    purity = entry["spaces"]["projection"]["purity"]
    assert {k: purity[k] for k in purity if k in at} == pytest.approx({k: at[k] for k in purity if k in at}, abs=1e-3)
    assert purity.keys() & at.keys()
    text = spaces.table({"runs": {"tiny": entry}})
    assert text.count("\n") == 5 and "| tiny | both |" in text
