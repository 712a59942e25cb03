"""Progress on terminals of any width, in pipes and in the log."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import pytest
from rich.console import Console

from scan_fast.runs import tracker as module
from scan_fast.runs.folder import RunFolder
from scan_fast.runs.tracker import Tracker, print_table, progress_on

COLUMNS = ["stage", "ACC", "NMI", "ARI", "", "seconds"]
ROWS = [
    ["k-means on features", "0.812", "0.800", "0.700", "", ""],
    ["selflabel", "0.912", "0.900", "0.850", "10 clusters used", "1234.5"],
]


def terminal(width: int) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, highlight=False, color_system=None)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def no_terminal() -> Console:
    return Console(file=io.StringIO(), width=40, highlight=False)


@pytest.mark.parametrize("width", [30, 40, 60, 70, 89, 90, 200])
def test_a_task_takes_one_line(width: int) -> None:
    console = terminal(width)
    progress = progress_on(console)
    note = "loss 1.234  consistency 0.321  entropy 2.302  selection_loss -1.234  head 3  acc 0.5  nmi 0.4"
    progress.add_task("seed 3: clustering", total=20_000, completed=12_345, rate="1,234 images/s", note=note)
    progress.add_task("images passed through the network", total=50_000, rate="", note="")
    lines = ["".join(part.text for part in line) for line in console.render_lines(progress.get_renderable())]
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert "seed 3: clustering" in lines[0]
    if width >= 60:
        assert "12345/20000  1,234 images/s" in lines[0]


@pytest.mark.parametrize("width", [40, 60, 70, 120])
def test_a_table_keeps_its_rows_and_numbers_whole(width: int) -> None:
    console = terminal(width)
    print_table("folder (test images)", COLUMNS, ROWS, console)
    lines = [line.rstrip() for line in printed(console).splitlines()]
    assert all(len(line) <= width for line in lines)
    (row,) = (line for line in lines if "selflabel" in line)
    assert [word for word in row.split() if word.replace(".", "").isdigit() and "." in word] == [
        "0.912",
        "0.900",
        "0.850",
        "1234.5",
    ]
    assert ("10 clusters used" in row) == (width >= 70)
    assert ("k-means on features" in printed(console)) == (width >= 60)


def test_a_table_in_a_pipe_is_not_cut() -> None:
    console = no_terminal()
    print_table("a title that is longer than all of the table, which has two columns only", COLUMNS, ROWS, console)
    text = printed(console)
    assert "10 clusters used" in text and "k-means on features" in text and "1234.5" in text
    assert len(text.splitlines()) == 1 + 3 + len(ROWS) + 1


def test_a_cell_is_no_markup() -> None:
    console = no_terminal()
    print_table("t", ["run", "ACC"], [["runs/[a]", "1"]], console)
    assert "runs/[a]" in printed(console)


def test_a_quiet_tracker_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(RunFolder(tmp_path), quiet=True, prefix="seed 3: ")
    with caplog.at_level(logging.INFO, logger="scan_fast"):
        tracker.say("mining: 5%")
        with tracker.progress("clustering", 4, 0) as ticker:
            ticker.step(10)
            ticker.epoch(2, 2, {"loss": 0.5})
    assert capsys.readouterr() == ("", "")
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.messages[0] == "seed 3: mining: 5%"
    assert caplog.messages[1].startswith("seed 3: clustering: epoch 2/2  loss 0.5  ")


def test_a_long_epoch_and_a_long_pass_have_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker(RunFolder(tmp_path))
    with tracker.progress("pretext", 8, 0) as ticker, tracker.counted("features", 3000) as done:
        ticker.step(10)
        done(1000)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(module, "STEP_SECONDS", 0.0)
        monkeypatch.setattr(module, "LINE_SECONDS", 0.0)
        ticker.step(10)
        done(1000)
        done(1000)  # the last needs no line
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("pretext: step 2/8  ")
    assert lines[1] == "features: 2,000 of 3,000"


def test_a_pass_during_a_stage_is_shown_below_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PASS_SECONDS", 0.0)
    tracker = Tracker(RunFolder(tmp_path))
    tracker.console = terminal(70)

    def shown() -> list[tuple[str, float]]:
        assert tracker._live is not None
        return [(task.description, task.completed) for task in tracker._live.tasks]

    with tracker.progress("pretext", 8, 0):
        with tracker.counted("features", 300) as done:
            assert shown() == [("pretext", 0)]
            done(100)
            done(50)
            assert shown() == [("pretext", 0), ("features", 150)]
        assert shown() == [("pretext", 0)]
    with tracker.counted("features", 300) as done:
        done(100)
        assert shown() == [("features", 100)]
    assert tracker._live is None
    assert sys.stdout is sys.__stdout__ or "rich" not in type(sys.stdout).__module__
