"""Check comments and docstrings of scan_fast/, csrc/, benchmarks/ and tools/ for wording that readers stumble over.

``python tools/check_language.py`` lists the findings that are not in ``tools/language_allowed.txt`` and the entries of
that list that no longer occur. ``--prune`` removes those entries. Nothing adds entries: new text has to be plain.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWED = Path(__file__).with_name("language_allowed.txt")
FOLDERS = ("scan_fast", "csrc", "benchmarks", "tools")
NATIVE = (".h", ".cpp", ".cu", ".cuh")

OPENINGS = re.compile(r"(What|Which|How|Whether|Where|Those)\b")
"""First words of a docstring that hide its verb."""

PHRASES = {
    # Of a place or after a formula the word is fine; as a condition it should be "if".
    "where for if": re.compile(r"(?<!, )(?<!Return )\b[Ww]here\b(?!\()"),
    "number format for dtype": re.compile(r"\bnumber formats?\b"),
    "levels for pixel values": re.compile(r"\b(?:grey )?levels\b|\bgrey level\b"),
    "anew for again": re.compile(r"\banew\b"),
    "of its own": re.compile(r"\bof (?:its|their) own(?=[.,;:)]|$| (?:and|at|for|in|is|of|on|or|so|to)\b)"),
    "comes to": re.compile(r"\b(?:comes?|came|coming) to\b"),
    "mend for fix": re.compile(r"\bmend(?:s|ed|ing)?\b"),
}

Finding = tuple[str, str]
"""Rule, and the line or first line without markers. The file is not part of it, so that text can move."""


def python_text(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line number, text, opens a docstring) of each line of a docstring or comment."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("#: "), False
    for node in ast.walk(ast.parse(source)):
        # Also the strings below a variable, which document it.
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for i, line in enumerate(node.value.value.splitlines()):
                yield node.lineno + i, line.strip(), i == 0


def native_text(source: str) -> Iterator[tuple[int, str, bool]]:
    """Yield (line number, text, False) of each ``//`` comment."""
    for number, line in enumerate(source.splitlines(), start=1):
        without_strings = re.sub(r'"(?:\\.|[^"\\])*"', '""', line)
        if "//" in without_strings:
            yield number, without_strings.split("//", 1)[1].strip(), False


def findings_in(path: Path) -> Iterator[tuple[int, Finding]]:
    """Yield the findings of one file with their line numbers."""
    read = python_text if path.suffix == ".py" else native_text
    for number, text, opens in read(path.read_text()):
        if opens and OPENINGS.match(text):
            yield number, ("opening", text)
        for rule, pattern in PHRASES.items():
            if pattern.search(text):
                yield number, (rule, text)


def findings(root: Path) -> list[tuple[str, Finding]]:
    """Return all findings below the root, each with its place, ``"file:line"``."""
    paths = [path for folder in FOLDERS for path in sorted((root / folder).rglob("*"))]
    return [
        (f"{path.relative_to(root)}:{number}", finding)
        for path in paths
        if path.suffix == ".py" or path.suffix in NATIVE
        for number, finding in findings_in(path)
    ]


def read_allowed(path: Path = ALLOWED) -> Counter[Finding]:
    """Read the allow-list: one ``rule<TAB>text`` per line."""
    lines = path.read_text().splitlines() if path.is_file() else []
    return Counter((rule, text) for rule, _, text in (line.partition("\t") for line in lines if line))


def compare(found: list[tuple[str, Finding]], allowed: Counter[Finding]) -> tuple[list[str], Counter[Finding]]:
    """Return one message per finding that is not allowed, and the entries that no longer occur."""
    left = allowed.copy()
    new = []
    for place, finding in found:
        if left[finding] > 0:
            left[finding] -= 1
        else:
            new.append(f"{place}: {finding[0]}: {finding[1]}")
    return new, +left


def main() -> int:
    """Print new findings and stale entries; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prune", action="store_true", help="remove entries that no longer occur from the list")
    parser.add_argument("--count", action="store_true", help="print the number of findings by rule")
    arguments = parser.parse_args()
    found, allowed = findings(ROOT), read_allowed()
    new, stale = compare(found, allowed)
    if arguments.count:
        for rule, count in Counter(finding[0] for _, finding in found).most_common():
            print(f"{count:5} {rule}")
    if arguments.prune and stale:
        kept = sorted((allowed - stale).elements())
        ALLOWED.write_text("".join(f"{rule}\t{text}\n" for rule, text in kept))
        stale = Counter()
    print(*new, sep="\n", end="\n" if new else "")
    for rule, text in stale.elements():
        print(f"{ALLOWED.name}: no longer occurs, run with --prune: {rule}: {text}")
    return 1 if new or stale else 0


if __name__ == "__main__":
    sys.exit(main())
