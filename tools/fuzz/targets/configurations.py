"""Configurations: plain values, YAML files, ``section.key=value`` words, command lines and plans of ablations."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from random import Random
from typing import Any

import yaml

from scan_fast.ablation import configure, find_ablation, read_ablation, shipped_ablations, variants_of
from scan_fast.cli import build_parser, main
from scan_fast.errors import ScanFastError
from scan_fast.parsing import EXIT_USAGE, split_overrides
from scan_fast.runs.config import Config, build_config, load_config, presets_of, shipped_configs
from scan_fast.runs.keys import all_keys

from ..mutations import TEXTS, WHOLE, as_json, bytes_like, change_tree, mutate, value_of
from ..target import Target, WrongResult, write

_TOKENS = (
    b"&a ", b"*a", b"<<: *a", b"!!python/object/apply:os.system ['true']", b"!!binary ", b"!!set ",
    b"!!timestamp 2001-01-01",
    b"? ", b"- ", b": ", b"[", b"]", b"{", b"}", b"|\n", b">\n", b"#", b"%YAML 1.2\n", b"---\n", b"...\n",
    b"base: a.yaml\n",
    b"base: ../a.yaml\n", b"presets:\n  a: {}\n", b"preset: a\n", b"kind: none", b"null", b".inf", b"!!float nan",
    b"0o17",
    b"1:30:00", b"\xff\xfe", b"\xef\xbb\xbf", b"\t",
)  # fmt: skip
_BASE = b"""name: a
preset: fast
clustering: {n_clusters: 3}
presets:
  fast: {pretext: {epochs: 2}}
  none: there is none
"""


def _default_values() -> dict[str, Any]:
    values: dict[str, Any] = Config().model_dump(mode="json")
    return values


def _sections() -> list[Any]:
    """Return sections of every kind, which may stand in for each other."""
    found: list[Any] = []
    for path in shipped_configs().values():
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        found += [value for value in values.values() if isinstance(value, dict)]
        for preset in (values.get("presets") or {}).values():
            found += [value for value in preset.values() if isinstance(value, dict)] if isinstance(preset, dict) else []
    kinds = sorted({key.kind for key in all_keys() if key.kind})
    return [*found, *({"kind": kind} for kind in kinds), *kinds]


def check_config(config: Config) -> None:
    """Check that a configuration survives being written and read.

    Raises:
        WrongResult: if it is another one afterwards.
    """
    text = config.to_yaml()
    again = build_config(yaml.safe_load(text))
    if again != config:
        raise WrongResult(f"the configuration is another one after it was written: {text}")


class Values(Target):
    """Plain values, as any reader of YAML hands them on."""

    name = "config-values"
    share = 120

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._default, self._sections = _default_values(), _sections()

    def draw(self, rng: Random) -> Any:
        """Return changed values of the default configuration, or of a single section."""
        if rng.random() < 0.02:
            return value_of(rng)
        tree = change_tree(rng, self._default, self._sections)
        if rng.random() < 0.5 and isinstance(tree, dict) and tree:
            key = rng.choice(list(tree))
            return {key: change_tree(rng, tree[key], self._sections)}
        return tree

    def feed(self, given: Any, folder: Path) -> None:
        """Build the configuration."""
        check_config(build_config(given))


class Overrides(Target):
    """Words ``section.key=value``."""

    name = "config-overrides"
    share = 60

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._keys = [key.name for key in all_keys()]

    def draw(self, rng: Random) -> Any:
        """Return a few words."""
        return [self._word(rng) for _ in range(rng.choice((1, 1, 1, 2, 3)))]

    def _word(self, rng: Random) -> str:
        key = rng.choice(self._keys)
        if rng.random() < 0.2:
            key = rng.choice(
                (key.rpartition(".")[0], f"{key}.kind", f"{key}.a", key[:-1], rng.choice(TEXTS), f".{key}", f"{key}.")
            )
        kind = rng.random()
        if kind < 0.4:
            value = as_json(value_of(rng)).decode()
        elif kind < 0.8:
            value = str(
                rng.choice((*TEXTS, *WHOLE, "[1, 2]", "{kind: none}", "simclr", "2x", "1e-3", "2001-01-01", "0.5"))
            )
        else:
            value = mutate(rng, b"{kind: strong, size: [1, 2]}", tokens=_TOKENS).decode("utf-8", "surrogateescape")
        word = f"{key}={value}"
        return word if rng.random() > 0.02 else word.replace("=", "")

    def feed(self, given: Any, folder: Path) -> None:
        """Read a small file with the words."""
        path = write(folder, "a.yaml", _BASE)
        check_config(load_config(path, given))


class YamlFiles(Target):
    """Files of configurations, with presets and a base."""

    name = "config-yaml"
    share = 50

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        self._sections = _sections()
        self._values = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in shipped_configs().values()]
        self._texts = [
            _BASE,
            b"base: b.yaml\npreset: fast\nmining: {k: 5}\n",
            b"a: &a {kind: strong, size: 8}\nclustering: {view: *a}\nselflabel: {view: *a, weak_view: plain}\n",
            b"pretext:\n  method:\n    kind: moco\n    temperature: 0.2\n  epochs: 3\nselflabel: null\n",
            b'{"data": {"source": "folder", "root": "/x"}, "model": {"backbone": "resnet18_cifar"}}\n',
        ]

    def draw(self, rng: Random) -> Any:
        """Return the bytes of a file and of the one that it may name as its base."""
        texts = []
        for _ in range(2):
            if rng.random() < 0.25:
                tree = rng.choice(self._values)
                small = {key: tree[key] for key in rng.sample(list(tree), min(3, len(tree)))}
                text = yaml.safe_dump(_without_deep(change_tree(rng, small, self._sections)), allow_unicode=True)
                texts.append(text.encode("utf-8", "surrogatepass"))
            else:
                texts.append(mutate(rng, rng.choice(self._texts), self._texts, _TOKENS))
        if rng.random() < 0.01:
            texts[0] = _nest(rng)
        return texts

    def feed(self, given: Any, folder: Path) -> None:
        """Read the file."""
        path = write(folder, "a.yaml", given[0])
        write(folder, "b.yaml", given[1])
        presets_of(path)
        check_config(load_config(path))


def _without_deep(tree: Any, depth: int = 0) -> Any:
    """Return a tree that YAML can write."""
    if depth > 20:
        return None
    if isinstance(tree, dict):
        return {key: _without_deep(value, depth + 1) for key, value in tree.items()}
    return [_without_deep(value, depth + 1) for value in tree] if isinstance(tree, list) else tree


def _nest(rng: Random) -> bytes:
    """Return text that nests deeply, or whose aliases stand for far more than it has."""
    depth = rng.choice((50, 300, 3000))
    kind = rng.randrange(4)
    if kind == 0:
        return b"data: " + b"[" * depth
    if kind == 1:
        return b"data: " + b"{a: " * depth + b"1" + b"}" * depth
    if kind == 2:
        return b"".join(b" " * i + b"a:\n" for i in range(min(depth, 300)))
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 31)]
    return "\n".join([*lines, "data: *a30", ""]).encode()


class Plans(Target):
    """Files of ablations."""

    name = "ablation-plans"
    share = 12

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        files = shipped_ablations().values()
        self._trees = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in files]
        self._texts = [b"title: a\nbase: {mining: {k: 5}}\nvariants:\n  a: {selflabel: {threshold: 0.9}}\n  b: {}\n"]
        self._texts.append(b'variants: {"2x": {clustering: {n_clusters: 2x}}, b: {pretext: {method: {kind: moco}}}}\n')
        self._texts.append(b"variants:\n  a: {clustering: {view: {from: selflabel.view}}}\n")
        self._sections = _sections()
        for name in shipped_ablations():
            find_ablation(name)

    def draw(self, rng: Random) -> Any:
        """Return the bytes of a file."""
        if rng.random() < 0.4:
            tree = _without_deep(change_tree(rng, rng.choice(self._trees), self._sections))
            return as_json(tree)
        return mutate(rng, rng.choice(self._texts), self._texts, _TOKENS)

    def feed(self, given: Any, folder: Path) -> None:
        """Read the plan and build the configurations of its variants."""
        base = write(folder, "base.yaml", b"clustering: {n_clusters: 3}\n")
        plan = read_ablation(write(folder, "plan.yaml", given))
        plan.only(None)
        for config in variants_of(plan, configure(plan, base, ())).values():
            check_config(config)


class CommandLines(Target):
    """Words of command lines: parsed by every command, carried out by ``config``."""

    name = "command-lines"
    share = 20
    permitted = (ScanFastError,)

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        parser = build_parser()
        self._commands = sorted(parser.subparsers)
        self._options = sorted({option for sub in parser.subparsers.values() for option in sub.options})
        self._words = [*(key.name for key in all_keys()), *shipped_configs(), "digits", "a.yaml", "run", ".", "folder"]

    def draw(self, rng: Random) -> Any:
        """Return words, without the NUL that no command line can hold."""
        words = [rng.choice((*self._commands, "config", "config", "config", rng.choice(TEXTS)))]
        for _ in range(rng.randrange(6)):
            kind = rng.random()
            if kind < 0.3:
                words.append(rng.choice(self._options))
            elif kind < 0.5:
                words.append(f"{rng.choice(self._words)}={rng.choice((*TEXTS, *map(str, WHOLE)))}")
            elif kind < 0.8:
                words.append(rng.choice(self._words))
            elif kind < 0.9:
                words.append(rng.choice((*TEXTS, *map(str, WHOLE))))
            else:
                text = bytes_like(rng, rng.randrange(12)).decode("utf-8", "surrogateescape")
                words.append(rng.choice(self._options) + "=" + text)
        if rng.random() < 0.1:
            rng.shuffle(words)
        return [word.replace("\0", "") for word in words]

    def feed(self, given: Any, folder: Path) -> None:
        """Parse the words; carry out ``config`` with them."""
        write(folder, "a.yaml", _BASE)
        out = io.StringIO()
        errors = _Encoded()
        with contextlib.redirect_stdout(_Encoded()), contextlib.redirect_stderr(errors):
            try:
                if given and given[0] == "config":
                    code = main(given)
                else:
                    parser = build_parser()
                    rest, _ = split_overrides(given, parser)
                    parser.parse_args(rest)
                    code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
        check_end(code, errors.getvalue() + out.getvalue())


class _Encoded(io.StringIO):
    """Text that must be fit for a terminal: standard error replaces what it cannot encode, standard output does not."""


def check_end(code: int, errors: str) -> None:
    """Check how a command ended.

    Raises:
        WrongResult: if it is neither a success nor a refusal in one line.
        ScanFastError: if it is a refusal.
    """
    if code == 0:
        return
    lines = errors.splitlines()
    if code != EXIT_USAGE:
        raise WrongResult(f"exit code {code}: {' / '.join(lines[-6:])}")
    # What is printed before, such as a note about images that were left out, is not the error.
    if not lines or not lines[-1].startswith("scan-fast: "):
        raise WrongResult(f"a refusal must end with one line, got {' / '.join(lines[-4:])}")
    raise ScanFastError(lines[-1])
