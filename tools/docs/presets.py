"""The tables of presets in docs/recipes.md: all that ``fast`` changes, and the training steps of the stages."""

from __future__ import annotations

from typing import Any

from scan_fast.data.loader import steps_per_epoch
from scan_fast.runs.config import Config, differences, load_config, shipped_configs

from .docstrings import ROOT

ORDER = ("cifar10", "cifar20", "stl10", "imagenet50", "imagenet100", "imagenet200", "imagenet", "folder", "digits")
"""The shipped configurations in the order of the table."""
FROM = {"digits": "reference"}
"""The preset that ``fast`` is compared with, if it is not ``paper``."""
_AS_YAML = {"None": "null", "True": "true", "False": "false"}
IMAGES = {
    "cifar10": 50_000,
    "cifar20": 50_000,
    "stl10": 5_000,
    "imagenet50": 64_274,
    "imagenet100": 128_545,
    "imagenet200": 256_558,
    "imagenet": 1_281_167,
    "digits": 1_348,
}
"""Training images of stages two and three; those of a folder are the user's."""


def changes(name: str) -> dict[str, tuple[str, str]]:
    """Return the settings that ``fast`` changes of a shipped configuration, each with the values before and after."""
    path = shipped_configs()[name]
    before, after = (load_config(path, [f"preset={preset}"]) for preset in (FROM.get(name, "paper"), "fast"))
    found = {}
    for line in differences(before, after):
        key, _, values = line.partition(": ")
        if key != "preset":
            old, _, new = values.partition(" -> ")
            found[key] = (_AS_YAML.get(old, old), _AS_YAML.get(new, new))
    return found


def table() -> str:
    """Return the table: a row for each setting and pair of values, with the configurations that it holds for."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for name in ORDER:
        for key, (old, new) in changes(name).items():
            rows.setdefault((key, old, new), []).append(name)
    keys = _keys(Config().model_dump(mode="json"))
    order = {key: number for number, key in enumerate(keys)}
    lines = ["| setting | `paper` | `fast` | configurations |", "|---|---|---|---|"]
    for (key, old, new), names in sorted(rows.items(), key=lambda row: order.get(row[0][0], len(order))):
        lines.append(f"| `{key}` | {old} | {new} | {', '.join(names)} |")
    return "\n".join(lines)


def _keys(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in values.items():
        keys += _keys(value, f"{prefix}{name}.") if isinstance(value, dict) else [prefix + name]
    return keys


def steps() -> str:
    """Return the table of training steps of stages two and three."""
    lines = ["| configuration | images | stage two, `paper` | `fast` | stage three, `paper` | `fast` |"]
    lines.append("|---|---:|---:|---:|---:|---:|")
    for name, n in IMAGES.items():
        path = shipped_configs()[name]
        presets = [load_config(path, [f"preset={preset}"]) for preset in (FROM.get(name, "paper"), "fast")]
        sections = [each for pair in zip(*((c.clustering, c.selflabel) for c in presets), strict=True) for each in pair]
        counts = ["" if s is None else f"{s.epochs * steps_per_epoch(n, s.batch_size):,}" for s in sections]
        lines.append(f"| {name} | {n:,} | {' | '.join(counts)} |")
    return "\n".join(lines)


TABLES = {"presets": table, "steps": steps}


def page() -> str:
    """Return docs/recipes.md with the tables of today, each between ``<!-- NAME -->`` and ``<!-- end -->``."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, make in TABLES.items():
        before, rest = text.split(f"<!-- {name} -->", 1)
        _, after = rest.split("<!-- end -->", 1)
        text = f"{before}<!-- {name} -->\n\n{make()}\n\n<!-- end -->{after}"
    return text
