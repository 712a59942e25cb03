"""Writes docs/api.md, docs/configuration.md and the table of presets in docs/recipes.md, from docstrings, models and
configurations: ``python -m tools.docs.reference``.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence

from . import api, configuration, presets
from .docstrings import ROOT

PAGES: dict[str, Callable[[], str]] = {
    "docs/api.md": api.page,
    "docs/configuration.md": configuration.page,
    "docs/recipes.md": presets.page,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pages, or with ``--check`` print how they differ; exit code 1 if they do."""
    parser = argparse.ArgumentParser(prog="python -m tools.docs.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        old = path.read_text(encoding="utf-8") if path.is_file() else ""
        if old == text:
            continue
        stale.append(name)
        if check:
            lines = difflib.unified_diff(old.splitlines(), text.splitlines(), name, "generated", lineterm="", n=1)
            print("\n".join(lines))
        else:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python -m tools.docs.reference", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
