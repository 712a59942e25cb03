"""Names and messages on the terminal: nothing in them moves the cursor, breaks the line or reverses the order."""

from __future__ import annotations

import io
import os
import unicodedata
from pathlib import Path

import pytest
from driving import TINY_FOLDER, contents, picture, run_here
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from scan_fast.errors import UsageError
from scan_fast.runs.names import check_name
from scan_fast.runs.tracker import print_table
from scan_fast.text import restored, shown, shown_lines, written

ANY = st.text(st.characters() | st.sampled_from("\\x5cud8f02a\x1b\udcff\ud800\u202e"), max_size=20)
ORDERS = "\x1b[2J", "\x07", "\x9b31m", "\r", "\n", "\u202e", "\u2066", "\u2028", "\x00", "\x7f"


@settings(max_examples=300, deadline=None)
@given(ANY, ANY)
def test_what_is_written_is_restored_and_two_names_stay_two(first: str, second: str) -> None:
    assert restored(written(first)) == first
    assert (written(first) == written(second)) == (first == second)
    assert shown(written(first)) == written(first)
    for character in written(first):
        assert unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
    written(first).encode()


def test_ordinary_names_stay_as_they_are() -> None:
    for name in ("a b.png", r"C:\users\photos\x.png", "ümläut 写真", "עברית.png", "👩‍👩‍👧.png", r"\n", "100%"):
        assert written(name) == shown(name) == restored(name) == name
    assert shown("\udcff\x1b\u202e\x9b\ud800\n") == r"\xff\x1b\u202e\u009b\ud800\x0a"
    assert written(r"\xff") == r"\x5cxff"
    assert shown_lines("a\tb\n\x1bc") == "a\tb\n\\x1bc"


@pytest.mark.parametrize("order", ORDERS)
def test_tables_and_group_names_obey_no_orders(order: str) -> None:
    file = io.StringIO()
    for terminal in (False, True):
        console = Console(file=file, force_terminal=terminal, width=80, color_system=None)
        print_table(f"a{order}b", ["run", f"c{order}"], [[f"d{order}e", "1"]], console)
    assert not set(file.getvalue()) & set("\x07\x9b\r\u202e\u2066\u2028\x00\x7f") and "\x1b[2J" not in file.getvalue()
    assert len(file.getvalue().splitlines()) == 2 * 6
    with pytest.raises(UsageError, match="must be one line of text"):
        check_name(f"a{order}b")


def test_a_run_on_images_with_hostile_names(tmp_path: Path) -> None:
    """The whole pipeline, its tables, its report, and what is applied to it; every name stays its own."""
    images = tmp_path / "photos"
    images.mkdir()
    hostile = [
        *(f"a{order}b.png" for order in ORDERS if order != "\x00"),
        *("=cmd|' !A0.png", "-1.png", "+a.png", "@b.png", "'=c.png", "./d.png".rpartition("/")[2], r"e\xff.png"),
        *('f"g,h;i.png', "<script>.png", "{{ 7*7 }}.png", "[bold]j.png"),
    ]
    names = [*map(os.fsencode, hostile), b"k\xff.png", b"k\xfe.png"]
    names += [b"%02d.png" % number for number in range(24 - len(names))]
    for number, name in enumerate(names):
        picture(number).save(os.path.join(os.fsencode(images), name).decode(errors="surrogateescape"))
    common = ("--clusters", 3, "--out", "out", *TINY_FOLDER, "selflabel=null")
    run = run_here("run", "--data", images, *common)
    assert (run.code, run.err) == (0, ""), run.err
    everything = sorted(map(os.fsdecode, names))
    from scan_fast.runs.artifacts import ASSIGNMENTS, ASSIGNMENTS_PARQUET
    from scan_fast.runs.folder import RunFolder

    folder = RunFolder(Path("out"))
    table = folder.read(ASSIGNMENTS)
    assert sorted(table.paths) == everything
    parquet = folder.read(ASSIGNMENTS_PARQUET)
    assert list(parquet.paths) == list(table.paths) and parquet.digest == table.digest
    assert not set(Path("out/assignments.csv").read_text()) & set("\x1b\r\u202e\x07")
    named = run_here("name", "out", 0, "=dogs")
    assert named.code == 0, named.err
    assert "'=dogs" in Path("out/assignments.csv").read_text()
    assert run_here("folders", "out", "--out", "groups").code == 0
    sorted_files = [name for name in contents(Path("groups")) if name.endswith(".png")]
    assert len(sorted_files) == len(names)
    found = run_here("predict", "out", "--data", images)
    assert found.code == 0 and len(found.out.splitlines()) == len(names) + 1
    assert not set(found.out) & set("\x1b\r\u202e\x07\x9b")
    again = run_here("run", "--data", images, *common)  # nothing left to do
    assert again.code == 0, again.err


@pytest.mark.parametrize("order", ["\x1b]0;title\x07", "\u202e", "\x9b2J", "\udcff"])
def test_error_lines_obey_no_orders(order: str, finished_run: Path, tmp_path: Path) -> None:
    bad = tmp_path / f"x{order}.png"
    bad.write_bytes(b"no image")
    picture(0).save(tmp_path / "good.png")
    line = run_here("predict", finished_run, "--data", tmp_path).refusal()
    assert shown(order) in line and not set(order) & set(line) & set("\x1b\x07\u202e\x9b\udcff")
    left_out = run_here("predict", finished_run, "--data", tmp_path, "--on-error", "skip")
    assert left_out.code == 0 and shown(order) in left_out.err and shown(left_out.err.strip()) == left_out.err.strip()
    traced = run_here("predict", finished_run, "--data", tmp_path, "--traceback")
    assert shown_lines(traced.err) == traced.err
