"""Markdown pages: their code blocks, their links, and what a shell command in them must be."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from torch.distributed.run import get_args_parser

from scan_fast.cli import build_parser
from scan_fast.parsing import split_overrides
from scan_fast.runs.config import find_config, load_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md"))
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it is, as an editor opens it."""
        return f"{self.page}:{self.line}"


def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    tokens = MarkdownIt("commonmark").parse((ROOT / page).read_text(encoding="utf-8"))
    return [
        Block(page, token.map[0] + 1, token.info.strip(), token.content)
        for token in tokens
        if token.type == "fence" and token.map is not None
    ]


def links(page: str) -> list[str]:
    """Return the targets of a page's links and images."""
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text(encoding="utf-8"))
    inner = [child for token in tokens for child in token.children or ()]
    return [
        str(child.attrs.get("href", child.attrs.get("src"))) for child in inner if child.type in ("link_open", "image")
    ]


def run_python(block: Block, names: dict[str, object], text: str | None = None) -> None:
    """Run a block of Python; a traceback shows its place in the page."""
    code = compile("\n" * block.line + (block.text if text is None else text), str(ROOT / block.page), "exec")
    exec(code, names)


def commands(block: Block) -> Iterator[list[str]]:
    """Return the words of each command of a block of shell."""
    for line in block.text.replace("\\\n", " ").splitlines():
        for part in line.split(" && "):
            words = shlex.split(part, comments=True)
            if words:
                yield words


def check_command(words: list[str]) -> None:
    """Check that a command exists and that it takes these words, without doing what it says.

    Raises:
        AssertionError: for a command that would not work, and for one that this function does not know.
    """
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    program, *rest = words
    if program == "scan-fast":
        check_scan_fast(rest)
    elif program == "make":
        result = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
    elif program == "python" and rest[:1] == ["-m"]:
        check_module(rest[1], rest[2:])
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), f"there is no {rest[0]}"
    elif program == "torchrun":
        check_torchrun(rest)
    elif program in ("sbatch", "kubectl"):
        assert (ROOT / rest[-1]).is_file(), f"there is no {rest[-1]}"
    elif program == "pip":
        assert rest[0] == "install", rest
        for word in rest[1:]:
            extra = word.partition("[")[2].rstrip("]")
            assert word[:1] != "." or not extra or extra in extras(), f"pyproject.toml has no extra {extra}"
    elif program in ("git", "cd", "export", "pre-commit"):
        assert rest, words
    elif "/" in program:
        assert os.access(ROOT / program, os.X_OK), f"{program} is no program of this repository"
    else:
        raise AssertionError(f"the tests do not know how to check {shlex.join(words)}")


def check_torchrun(words: list[str]) -> None:
    """Check a command of torchrun: its own options, and the script or the command of scan-fast that it starts."""
    try:
        options = get_args_parser().parse_args(words)
    except SystemExit as stop:
        raise AssertionError(f"torchrun refuses {shlex.join(words)}") from stop
    if options.module and options.training_script == "scan_fast":
        check_scan_fast(options.training_script_args)
    elif options.module:
        check_module(options.training_script, options.training_script_args)
    else:
        script = ROOT / options.training_script
        assert script.is_file(), f"torchrun starts no script of this repository: {words}"


def check_scan_fast(words: list[str]) -> None:
    """Check a command of scan-fast, and its configuration if it names a shipped one."""
    rest, overrides = split_overrides(words, build_parser())
    try:
        options = build_parser().parse_args(rest)
    except SystemExit as stop:
        assert not stop.code, f"scan-fast refuses {shlex.join(words)}"
        return
    target = getattr(options, "target", None)
    if "config" in options:  # the target is a run or a file
        target = options.config
        if target is None:
            assert not overrides, f"{overrides} goes with --config"
            return
    if "overrides" in options and (target is None or not str(target).startswith("runs/")):
        data = getattr(options, "data", None)
        load_config(find_config("folder" if data is not None or target in (None, "RUN") else str(target)), overrides)


def check_module(name: str, words: list[str]) -> None:
    """Check that a module can be run and that its source knows the options that are given."""
    found = importlib.util.find_spec(name)
    assert found is not None and found.origin is not None, f"there is no module {name}"
    if name.partition(".")[0] not in ("benchmarks", "tools"):
        return
    source = Path(found.origin).read_text(encoding="utf-8") + (ROOT / "benchmarks/harness.py").read_text(
        encoding="utf-8"
    )
    for word in words:
        assert not word.startswith("--") or f'"{word.partition("=")[0]}"' in source, f"{name} has no option {word}"


def extras() -> list[str]:
    """Return the extras of pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("[project.optional-dependencies]\n")[2].partition("\n[")[0]
    return [line.partition(" =")[0] for line in section.splitlines() if " = " in line]
