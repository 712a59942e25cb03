"""A run folder that is deleted or moved away while a run writes it: the run stops and makes nothing anew."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from driving import TINY, Process
from faults import Fault

SHORT = ("data.limit=96", "pretext.epochs=1", "clustering.epochs=1", "selflabel.epochs=1")


@pytest.mark.skipif(sys.platform != "linux", reason="the files of handles are read from /proc")
@pytest.mark.parametrize(
    ("at", "way"),
    # After so many files, which lie in different stages.
    [(4, "delete the folder"), (9, "move the folder"), (15, "delete the folder"), (20, "move the folder")],
)
def test_a_run_whose_folder_is_gone_stops_with_its_name(at: int, way: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = ["run", "digits", *TINY, *SHORT, "runtime.checkpoint_seconds=0", "--quiet", "--out", folder]
    fault = Fault(str(folder), str(tmp_path / "calls"), "replace", at, way)
    message = Process(*words, log=tmp_path / "log", death=fault).result().refusal()
    assert str(folder) in message
    assert "first" not in message, "another command on this folder is no help"
    assert not folder.exists()
