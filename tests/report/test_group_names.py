"""Names of groups: the command, the tables, the report, predictions, and another grouping."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from driving import TINY_FOLDER, fill, run_here
from report_runs import Page

from scan_fast.runs import artifacts
from scan_fast.runs.folder import RunFolder


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run on a folder; each test gives all names anew."""
    folder = tmp_path_factory.mktemp("named")
    fill(folder / "images", 36)
    words = ("--data", folder / "images", "--clusters", 3, *TINY_FOLDER, "selflabel=null", "--out", folder / "run")
    result = run_here("run", *words, "--quiet")
    assert result.code == 0, result.err
    return folder / "run"


def column(text: str, name: str) -> list[str]:
    return [row.get(name, "") for row in csv.DictReader(io.StringIO(text, newline=""))]


def test_names_are_kept_and_written_everywhere(named_run: Path, tmp_path: Path) -> None:
    result = run_here("name", named_run, 0, "red <shoes>", "#1", "a=b, 'c'")
    assert result.code == 0, result.err
    assert "2 of 3 groups have a name" in result.out
    names = {"0": "red <shoes>", "1": "a=b, 'c'", "2": ""}
    assert json.loads((named_run / "names.json").read_text())["names"] == {k: v for k, v in names.items() if v}
    assert run_here("name", named_run, "--list").out == "0\tred <shoes>\n1\ta=b, 'c'\n"
    text = (named_run / "assignments.csv").read_text()
    assert text.startswith("path,cluster,confidence,margin,split,name\n")
    assert column(text, "name") == [names[c] for c in column(text, "cluster")]
    table = RunFolder(named_run).read(artifacts.ASSIGNMENTS)
    assert len(table.paths) == 36
    page = Page((named_run / "report.html").read_text())
    assert "red <shoes>" in page.words and "a=b, 'c'" in page.words
    assert {known["title"] for known in page.data["groups"]} <= {"red <shoes>", "a=b, 'c'", "group 2"}
    fill(tmp_path / "new", 4, first=50)
    for target in (named_run, named_run / "model.pt"):
        predicted = run_here("predict", target, "--data", tmp_path / "new").out
        assert column(predicted, "name") == [names[c] for c in column(predicted, "cluster")]
    # One is taken away, then all.
    assert run_here("name", named_run, 0, "--clear").code == 0
    assert run_here("name", named_run, "--list").out == "1\ta=b, 'c'\n"
    assert run_here("name", named_run, "--clear").code == 0
    assert (named_run / "assignments.csv").read_text().startswith("path,cluster,confidence,margin,split\n")
    assert "name" not in run_here("predict", named_run, "--data", tmp_path / "new").out


def test_names_stay_with_their_grouping(named_run: Path) -> None:
    assert run_here("name", named_run, 2, "last").code == 0
    before = column((named_run / "assignments.csv").read_text(), "cluster")
    placed = (named_run / "map.npz").stat().st_mtime_ns
    # The same clustering again gives the same groups: the names stay.
    assert run_here("cluster", named_run, "--again", "--quiet").code == 0
    assert column((named_run / "assignments.csv").read_text(), "cluster") == before
    assert run_here("name", named_run, "--list").out == "2\tlast\n"
    assert (named_run / "map.npz").stat().st_mtime_ns == placed  # the embeddings are the same
    assert set(column((named_run / "assignments.csv").read_text(), "name")) <= {"", "last"}
    # Another clustering: they are set aside, and said to be.
    result = run_here("cluster", named_run, "--again", "--clusters", 4)
    assert result.code == 0, result.err
    said = " ".join(result.out.split())
    assert "the groups are not those that were named; their names are in names-former-1.json now" in said
    assert json.loads((named_run / "names-former-1.json").read_text())["names"] == {"2": "last"}
    assert not (named_run / "names.json").exists()
    assert run_here("name", named_run, "--list").out == ""
    assert run_here("name", named_run, 3, "new").code == 0
    assert run_here("cluster", named_run, "--again", "--clusters", 3, "--quiet").code == 0
    assert json.loads((named_run / "names-former-2.json").read_text())["names"] == {"3": "new"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((0,), "give pairs of a group and its name"),
        ((7, "x"), "a group is a number from 0 to "),
        (("dogs", 0), "a group is a number from 0 to "),
        ((0, "  "), "must have 1 to 80 characters, got 0"),
        ((0, "x" * 81), "must have 1 to 80 characters, got 81"),
        ((0, "two\nlines"), "must be one line of text"),
        ((0, "x", "--list"), "--list goes with nothing else"),
        ((9, "--clear"), "a group is a number from 0 to "),
    ],
)
def test_what_is_no_name_is_refused(words: tuple[object, ...], message: str, named_run: Path) -> None:
    before = {p.name: p.read_bytes() for p in named_run.glob("names*.json")}
    assert message in run_here("name", named_run, *words).refusal()
    assert {p.name: p.read_bytes() for p in named_run.glob("names*.json")} == before


def test_names_are_kept_if_the_images_are_gone(named_run: Path) -> None:
    images = named_run.parent / "images"
    images.rename(named_run.parent / "elsewhere")
    try:
        result = run_here("name", named_run, 1, "kept")
        assert result.code == 0, result.err
        assert "the names are kept, but the report cannot be written again" in " ".join(result.out.split())
        assert run_here("name", named_run, "--list").out == "1\tkept\n"
    finally:
        (named_run.parent / "elsewhere").rename(images)
    (named_run / "names.json").write_text("[]")
    message = run_here("name", named_run, "--list").refusal()
    assert "names.json cannot be read" in message and "remove it, and name the groups again" in message
    (named_run / "names.json").unlink()
