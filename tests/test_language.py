"""The wording of comments and docstrings: no finding beyond the list of known ones, which can only shrink."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "check_language.py"
_spec = importlib.util.spec_from_file_location("check_language", SCRIPT)
assert _spec is not None and _spec.loader is not None
check = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check)

PYTHON = '''"""Whether a file is read."""

LIMIT = 3
"""What fits."""
# It stops where memory ends.
text = "where and anew in a string"  # torch.where(x) is code


def function():
    """Return levels anew.

    Raises:
        ValueError: where a value is wrong.
    """
'''
NATIVE = """// A list of its own, anew.
const char* text = "// where";  // where it comes to an end
int count = 0;
"""


def test_no_new_findings_and_no_stale_entries() -> None:
    new, stale = check.compare(check.findings(check.ROOT), check.read_allowed())
    assert not new, "write these in plain words:\n" + "\n".join(new)
    assert not stale, f"these no longer occur; run python tools/check_language.py --prune: {sorted(stale)}"


@pytest.mark.parametrize(
    "name, source, expected",
    [
        (
            "module.py",
            PYTHON,
            {
                (1, "opening"),
                (4, "opening"),
                (5, "where for if"),
                (10, "levels for pixel values"),
                (10, "anew for again"),
                (13, "where for if"),
            },
        ),
        ("kernel.cuh", NATIVE, {(1, "of its own"), (1, "anew for again"), (2, "where for if"), (2, "comes to")}),
    ],
)
def test_findings(name: str, source: str, expected: set[tuple[int, str]], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(source)
    assert {(number, finding[0]) for number, finding in check.findings_in(path)} == expected


@pytest.mark.parametrize(
    "line",
    ["x = torch.where(a, b, c)", "the mean, where m is the margin", "Return where a file is.", "in its own words"],
)
def test_plain_lines_are_no_findings(line: str, tmp_path: Path) -> None:
    path = tmp_path / "kernel.cpp"
    path.write_text(f"// {line}\n")
    assert list(check.findings_in(path)) == []


def test_each_entry_allows_one_occurrence() -> None:
    finding = ("anew for again", "anew")
    new, stale = check.compare([("a.py:1", finding), ("b.py:2", finding)], Counter([finding, ("comes to", "x")]))
    assert new == ["b.py:2: anew for again: anew"] and stale == Counter([("comes to", "x")])
