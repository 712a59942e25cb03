"""All pages: their links lead somewhere, their commands exist, and their Python compiles or runs."""

from __future__ import annotations

import ast
import doctest
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from pages import PAGES, ROOT, blocks, check_command, commands, links, run_python

from scan_fast import ImageClusterer

RUN = ("docs/configuration.md", "docs/troubleshooting.md", "CONTRIBUTING.md")
"""Pages whose Python runs as it stands; elsewhere it may be a sketch and has to compile."""

LANGUAGES = {"python", "py", "pycon", "sh", "yaml", "text", "cpp", "cmake", "toml", "json"}


def test_all_pages_are_found() -> None:
    assert {
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/architecture.md",
        "docs/extending/objective.md",
    } < set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    for target in links(page):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor and path.suffix == ".md":
            assert anchor in anchors(path), f"{page} links to {target}"


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page as GitHub makes them from its headings, and those that it sets itself."""
    found = set()
    for line in path.read_text(encoding="utf-8").splitlines():
        if 'id="' in line:
            found.add(line.partition('id="')[2].partition('"')[0])
        if line.startswith("#"):
            title = line.lstrip("#").strip().lower().replace("`", "")
            found.add("".join(letter for letter in title if letter.isalnum() or letter in " -_").replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_blocks(page: str) -> None:
    names: dict[str, object] = {}
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: name the language of this block"
        if block.language == "sh":
            for words in commands(block):
                try:
                    check_command(words)
                except (AssertionError, ValueError) as error:
                    raise AssertionError(f"{block.place}: {error}") from error
        elif block.language == "python" and page in RUN:
            run_python(block, names)
        elif block.language == "python":
            compile(block.text, block.place, "exec")


@pytest.mark.parametrize("module", ["scan_fast.losses", "scan_fast.neighbors"])
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(import_module(module), extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0


def texts_of_the_source() -> list[str]:
    """Return all texts in the package and setup.py, with blanks made one; an f-string is its constant parts."""
    found = []
    for path in (ROOT / "setup.py", *(ROOT / "scan_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(" ".join(node.value.split()))
    return found


def raised(*calls: Callable[[], object]) -> list[str]:
    """Return the messages of calls that must fail."""
    found = []
    for call in calls:
        with pytest.raises(ValueError) as error:
            call()
        found.append(" ".join(str(error.value).split()))
    return found


def test_quoted_errors_are_those_of_the_source() -> None:
    """Each part of a quoted message, between those that differ, is in the source or in a message raised here."""
    pixels = np.linspace(0, 1, 2 * 8 * 8 * 3, dtype=np.float32).reshape(2, 8, 8, 3)
    messages = raised(
        lambda: ImageClusterer(2).predict(pixels),
        lambda: ImageClusterer(2).fit(pixels),
        lambda: ImageClusterer(2).fit(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)),
        lambda: ImageClusterer(2, settings={"pretext.epoch": 50}).fit(pixels),
        lambda: ImageClusterer(2, settings={"seed": 1}).fit(pixels),
    )
    texts = texts_of_the_source() + messages
    quoted = [block for block in blocks("docs/troubleshooting.md") if block.language == "text"]
    assert len(quoted) > 20
    for block in quoted:
        for line in block.text.splitlines():
            parts = [part.strip(" .:;(),") for part in line.split("…")]
            assert max(map(len, parts)) > 10, f"{block.place}: {line}"
            for part in parts:
                assert any(part in text for text in texts), f"{block.place}: no message has {part!r}"
    for message in messages:
        assert any(message in block.text for block in quoted), message
